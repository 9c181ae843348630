"""A model and a text in, the negative log-likelihood of every token out."""
