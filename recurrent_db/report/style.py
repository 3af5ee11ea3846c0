"""The page's style sheet: system fonts, a light and a dark theme, tables and figures that fit a phone."""

LIGHT = """
  --page: #f6f7f9; --card: #ffffff; --ink: #1f2328; --muted: #59636e; --grid: #d8dee4; --link: #0a5ea8;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #c06794; --s4: #d08c00; --s5: #3a9fdc; --s6: #4d4d4d;
"""
DARK = """
  --page: #101316; --card: #181c20; --ink: #e6e9ec; --muted: #9aa5b1; --grid: #343b43; --link: #6db6f2;
  --s0: #4a9fe0; --s1: #ee7d33; --s2: #2fbf95; --s3: #dd93b8; --s4: #f0b429; --s5: #8fd0f5; --s6: #b8bfc6;
"""
"""The palette of `svg.SERIES`: its lightest colours darkened for the light theme, all of them lightened for the dark one."""

CSS = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }}
body {{
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}}
main, header {{ max-width: 1132px; margin: 0 auto; padding: 0 16px; }}
header {{ padding-top: 28px; }}
h1 {{ font-size: 26px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }}
h2 {{ font-size: 19px; line-height: 1.3; margin: 0 0 8px; }}
h3 {{ font-size: 15px; margin: 18px 0 6px; overflow-wrap: anywhere; }}
p {{ margin: 0 0 10px; max-width: 88ch; }}
a {{ color: var(--link); }}
nav {{ display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 10px 0 18px; font-size: 14px; }}
nav a {{ text-decoration: none; padding: 3px 0; }}
nav a:hover {{ text-decoration: underline; }}
section {{
  background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 18px 20px; margin: 0 0 18px;
  scroll-margin-top: 12px;
}}
.note, caption, figcaption, small {{ color: var(--muted); font-size: 13.5px; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 6px 0 10px; padding: 0; list-style: none; }}
.legend li {{ display: flex; align-items: center; gap: 7px; font-size: 14px; overflow-wrap: anywhere; }}
.swatch {{ width: 38px; height: 14px; flex: none; }}
.box {{ width: 24px; height: 14px; flex: none; }}
.grid {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px 26px; }}
.grid.small {{ grid-template-columns: repeat(3, minmax(0, 1fr)); }}
figure {{ margin: 0; min-width: 0; }}
figure.wide {{ max-width: 490px; }}
.grid:not(.small) figure {{ max-width: 490px; }}
figcaption {{ font-weight: 600; color: var(--ink); margin: 0 0 4px; }}
figure svg {{ display: block; width: 100%; height: auto; max-width: 100%; overflow: visible; }}
figure img {{ display: block; max-width: 100%; height: auto; }}
figure svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
figure svg text {{ font-family: inherit; }}
.halo text {{ paint-order: stroke; stroke: var(--card); stroke-width: 3px; }}
.scroll {{ overflow-x: auto; margin: 8px -20px 0; padding: 0 20px 4px; }}
table {{ border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; min-width: 100%; }}
caption {{ text-align: left; caption-side: bottom; padding-top: 8px; }}
th, td {{ padding: 6px; text-align: right; vertical-align: top; white-space: nowrap; }}
th, td {{ border-bottom: 1px solid var(--grid); }}
thead th {{ color: var(--muted); font-weight: 600; vertical-align: bottom; line-height: 1.25; }}
thead th {{ border-bottom-color: var(--muted); }}
th:first-child, td:first-child, .left {{ text-align: left; }}
tbody th {{ font-weight: 600; }}
th:first-child {{ position: sticky; left: -20px; background: var(--card); }}
tbody tr:last-child > * {{ border-bottom: 0; }}
td small, th small {{ display: block; font-weight: 400; }}
.run {{ display: inline-flex; align-items: center; gap: 7px; width: max-content; max-width: 215px; }}
.run {{ white-space: normal; overflow-wrap: anywhere; text-align: left; }}
.group th {{ padding-top: 14px; }}
.group div {{ white-space: normal; max-width: min(1040px, calc(100vw - 64px)); }}
.group small {{ display: inline; margin-left: 8px; }}
.group .run {{ vertical-align: middle; max-width: none; }}
.samples td, .samples th {{ white-space: normal; text-align: left; }}
.samples td {{ min-width: 250px; }}
.samples th:first-child {{ min-width: 110px; max-width: 180px; overflow-wrap: anywhere; }}
pre {{
  margin: 0; font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}}
td pre + small {{ margin-top: 10px; }}
details {{ border: 1px solid var(--grid); border-radius: 8px; padding: 6px 12px; margin: 8px 0; }}
summary {{ cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }}
details pre {{ margin: 8px 0; }}
details .scroll {{ margin: 4px -12px 0; padding: 0 12px 4px; }}
details th:first-child {{ left: -12px; }}
dl {{ display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px; margin: 8px 0; font-size: 14px; }}
dt {{ color: var(--muted); }}
dl.note dt {{ font-weight: 600; }}
.scroll + dl {{ margin-top: 18px; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
footer {{ max-width: 1132px; margin: 0 auto; padding: 0 16px 32px; }}
@media (max-width: 760px) {{
  .grid, .grid.small {{ grid-template-columns: minmax(0, 1fr); }}
  section {{ padding: 14px 14px; border-radius: 8px; }}
  .scroll {{ margin: 8px -14px 0; padding: 0 14px 4px; }}
  th:first-child {{ left: -14px; }}
  tbody th {{ white-space: normal; overflow-wrap: anywhere; min-width: 120px; max-width: 42vw; }}
  .group th {{ max-width: none; }}
  .run {{ max-width: 140px; }}
  dl {{ grid-template-columns: 1fr; }}
  dd {{ margin-bottom: 6px; }}
}}
@media print {{
  body {{ background: none; }}
  section {{ border: 0; padding: 0; }}
  figure, tr {{ break-inside: avoid; }}
  nav {{ display: none; }}
}}
"""
