"""The training loss: which student layer learns which teacher layer, and how their difference is measured."""
