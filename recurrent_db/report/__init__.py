"""`recurrent-db report RUN... -o report.html`: one self-contained HTML page that compares training runs.

runs.py          `Run`: the data that a report reads from a run directory
flops_to_loss.py FLOPs to reach a held-out NLL; keeps annealed and unannealed losses apart
cost.py          a run's cost: FLOPs per token by part, bytes by holder, energy
curves.py        smoothing and thinning of curves
figure.py        shared parts of all figures: line styles, axes, ticks, output
line_plots.py    figures with lines
stacked_bars.py  figures with stacked bars
svg.py           turns a matplotlib figure into an inline SVG with the page's colours
comparison.py    `Comparison`: runs, plots, labels and legends, the input of every section
html.py          text, numbers and tables as HTML
sections/        the sections, by topic
page.py          the order of the sections and the HTML around them; `write_report`
style.py         the page's style sheet
"""
