"""Ready-made behaviours: what people ask of a model, one number a test point.

Each is a plain ``culpa.Behaviour``; any other is a Python function away.
"""

from culpa.behaviours.classification import accuracy as accuracy
from culpa.behaviours.classification import calibration_error as calibration_error
from culpa.behaviours.classification import log_likelihood as log_likelihood
from culpa.behaviours.classification import margin as margin
from culpa.behaviours.classification import overconfidence as overconfidence
from culpa.behaviours.groups import group_gap as group_gap
from culpa.behaviours.language import Completions as Completions
from culpa.behaviours.language import completions as completions
from culpa.behaviours.language import preference_margin as preference_margin
from culpa.behaviours.language import sequence_log_likelihood as sequence_log_likelihood
from culpa.behaviours.regression import embedding_similarity as embedding_similarity
from culpa.behaviours.regression import regression_error as regression_error
