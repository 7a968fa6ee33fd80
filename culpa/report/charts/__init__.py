"""Chart builders: pure functions from numbers to Vega-Lite specifications (needs Altair)."""

from culpa.report.charts.bars import Bar as Bar
from culpa.report.charts.bars import in_words as in_words
from culpa.report.charts.bars import stage_bars as stage_bars
from culpa.report.charts.strip import Band as Band
from culpa.report.charts.strip import Stem as Stem
from culpa.report.charts.strip import update_strip as update_strip
from culpa.report.charts.theme import Drawing as Drawing
