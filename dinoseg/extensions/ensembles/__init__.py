"""Ensembles: several trained models as one, by the mean of their class probabilities."""
