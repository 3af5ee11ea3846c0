"""`recurrent-db report RUN... -o report.html`: one self-contained page that compares training runs.

runs.py          what a report reads from a run directory: `Run`
flops_to_loss.py FLOPs to reach a held-out NLL, without mixing annealed and unannealed losses
cost.py          what a run cost: FLOPs per token by part, bytes by holder, energy
curves.py        smoothing and thinning of curves
figure.py        the frame of the figures: a run's look, axes, ticks, legends
line_plots.py    the figures with lines
stacked_bars.py  the figures with stacked bars
svg.py           a matplotlib figure -> an inline SVG that follows the page's colours
comparison.py    the runs with their plots, labels and legends: what a section gets
html.py          words, numbers and tables as HTML
sections/        the sections, by topic
page.py          the sections' order and the HTML around them; `write_report`
style.py         the page's style sheet
"""
