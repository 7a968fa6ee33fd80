"""How an audit is shown: one self-contained HTML file (``html``) or terminal tables (``table``)."""
