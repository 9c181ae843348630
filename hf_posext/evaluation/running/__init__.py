"""A run: what there is to measure, over processes, with a journal, and past what fails."""
