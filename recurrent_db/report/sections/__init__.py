"""The sections of a report: each is a function from a `Comparison` of runs to HTML, and knows nothing of the page."""
