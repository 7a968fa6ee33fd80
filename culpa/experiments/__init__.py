"""The paper's experiments, and the demo: ``culpa reproduce NAME [--scale paper|small]``.

How to add an experiment
------------------------
One file an experiment, ``culpa/experiments/<name with underscores>.py``, which ends with

    EXPERIMENT = Experiment(
        name="mnist-insert",                  # as the command line calls it
        title="...",                          # the page's headline
        paper="Fig. 3a, Fig. 5, §E.2.1",      # where it stands in the paper
        must_show="...",                      # what has to be seen, in a sentence
        scales={"paper": Options(...), "small": Options(...), "smoke": Options(...)},
        run=run,                              # (Setup) -> Findings
    )

and one line in ``registry.py``. ``Options`` is a frozen ``msgspec.Struct`` of this experiment's own
with at least ``seeds: int``, how many seeds the scale has. ``paper`` follows the paper's settings
and raises ``OptionError`` where its data is absent; ``small`` takes what is at hand within minutes
on two cores, and says in ``Findings.stand_ins`` what it stands in for; ``smoke`` is for the tests,
a few seconds on synthetic or bundled data.

``run(setup)`` cuts its work into parts, usually one for each seed:

    setup.work.plan(len(setup.seeds))
    for seed in setup.seeds:
        make = partial(examine, setup.options, seed)
        value = setup.work.part(f"seed-{seed}", {"seed": seed, "data": ...}, make)

``examine(options, seed, part)`` returns what JSON can hold (dictionaries with text keys, lists,
numbers, text; no nan). Every training in it is recorded: ``culpa.record(part.folder("run"), ...,
overwrite=True)``, then ``run = part.opened("run")``, which verifies the run and notes its root
digest beside the numbers. A finished part is kept as JSON with its options, versions and digests,
and is not computed again; what was computed with other options is. Results are always read back
from that JSON, so a resumed table and a fresh one are the same.

At the end ``run`` returns ``Findings``: tables (the paper's rows first), figures (plain Vega-Lite,
made by ``frame/charts.py`` or by hand; no image of CelebA ever), and claims: every sentence of
"must show" with whether it held here and by which numbers, also, and above all, where it did not.

Retraining truth is ``culpa.replay``: ``counterfactual="skip"`` for updates left out inside of a
job (§E.1, insertion and mislabelling), ``"restart"`` for whole stages that are jobs of their own.
The additive form sums effects of single updates, after which no optimizer restarts: give it
``"skip"`` in both cases, or every update is charged with the momentum that its restart would lose.
``pipeline.py`` trains and compares, ``baselines.py`` has DVEmb's stage embeddings.

Data comes through ``setup.data`` (a ``DataFolder``) and the loaders in ``data/``, one file a data
set: each reads the public layout, and the packed file of the same name where there is one. No path
of a machine goes into ``Findings``.

A smoke test of each experiment, ``tests/experiments/test_<name>.py``, runs its ``smoke`` scale,
asserts what is robust there, and verifies its runs.
"""
