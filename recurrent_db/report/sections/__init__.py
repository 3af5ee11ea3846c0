"""The sections of a report. Each is a function from a `Comparison` to HTML, independent of the page."""
