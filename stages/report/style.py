"""The style sheet of the page: one column of paper, one accent, light and dark, from 1280 pixels down to a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #1d1c1a; --soft: #66635d; --rule: #e3e0d8; --wash: #f1efe9;
  --accent: #2353c4; --good: #18794a; --bad: #bf3127; --mark: #8a867e;
  --s0: #2353c4; --s1: #c2600c; --s2: #18845a; --s3: #7a48bd; --s4: #0b7f8f; --s5: #b8326b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141519; --card: #1c1e23; --ink: #eae8e2; --soft: #a5a29a; --rule: #32353c; --wash: #24262c;
    --accent: #8fb0ff; --good: #5fce97; --bad: #ff8f84; --mark: #8b8982;
    --s0: #8fb0ff; --s1: #f5a35c; --s2: #5fce97; --s3: #c3a1f5; --s4: #5fcbd8; --s5: #f58db5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
.page { max-width: 1120px; margin: 0 auto; padding: 0 28px 72px; }
h1, h2, h3, p, figure, ul, ol, dl, dd { margin: 0; padding: 0; }
h1 { font-size: 38px; line-height: 1.1; letter-spacing: -0.022em; font-weight: 680; overflow-wrap: anywhere; }
h2 { font-size: 22px; line-height: 1.25; letter-spacing: -0.012em; font-weight: 650; }
h3 { font-size: 15px; font-weight: 640; line-height: 1.35; }
a { color: var(--accent); text-underline-offset: 3px; }
a:focus-visible, summary:focus-visible, input:focus-visible + label { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
code, .mono { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.soft { color: var(--soft); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
i { font-style: normal; }
.small { font-size: 13px; line-height: 1.5; }
.num { font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); }

header { padding: 52px 0 30px; }
.over { font-size: 13px; font-weight: 600; color: var(--soft); margin-bottom: 10px; }
.lead { font-size: 18px; line-height: 1.5; color: var(--ink); max-width: 46em; margin-top: 14px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 12px 0; border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule);
  margin-top: 34px; font-size: 14px; }
nav a { color: var(--soft); text-decoration: none; padding: 3px 0; }
nav a:hover { color: var(--ink); text-decoration: underline; }
section { padding-top: 52px; }
section > .intro { color: var(--soft); max-width: 62em; margin-top: 6px; }
section > h3, .group > h3 { margin-top: 30px; }
.group { margin-top: 8px; }
header > .scroll { margin-top: 30px; }

/* headline numbers */
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 16px; margin-top: 34px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 20px 22px 18px; display: flex; flex-direction: column; }
.tile .what { font-size: 14px; font-weight: 600; }
.tile .where { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 46px; line-height: 1.1; letter-spacing: -0.03em; font-weight: 660; margin-top: 12px; }
.tile .value .unit { font-size: 18px; letter-spacing: 0; font-weight: 500; color: var(--soft); margin-left: 5px; }
.tile .interval { color: var(--soft); font-size: 13px; margin: 2px 0 14px; }
.tile dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 14px; margin-top: 12px; font-size: 13px; color: var(--soft); }
.tile dd { text-align: right; color: var(--ink); }

/* a number on the line from 0 to 1, its interval, and the controls */
.strip { position: relative; height: 18px; min-width: 90px; }
.strip::before { content: ""; position: absolute; left: 0; right: 0; top: 8px; height: 2px; background: var(--rule); border-radius: 1px; }
.strip span { position: absolute; }
.strip .span { top: 3px; height: 12px; border-radius: 2px; background: color-mix(in srgb, var(--accent) 30%, transparent); min-width: 2px; }
.strip .at { top: 1px; width: 3px; height: 16px; margin-left: -1.5px; border-radius: 2px; background: var(--accent); }
.strip .untrained, .strip .shuffled { top: 4px; width: 10px; height: 10px; margin-left: -5px; background: var(--card); border: 2px solid var(--mark); }
.strip .shuffled { border-radius: 50%; }
.strip .untrained { transform: rotate(45deg) scale(0.84); }
.strip .chance { top: 9px; margin-left: -5px; border: 5px solid transparent; border-top: 0; border-bottom: 8px solid var(--mark); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; color: var(--soft); margin-top: 14px; }
.legend .key { display: inline-flex; align-items: center; gap: 8px; }
.legend .strip { width: 16px; min-width: 16px; } .legend .strip::before { display: none; }
.legend .swatch { width: 18px; height: 0; border-top: 2.5px solid var(--tone); } .legend .swatch.dashed { border-top-style: dashed; opacity: .75; }

/* tables */
.scroll { overflow-x: auto; margin-top: 14px; border: 1px solid var(--rule); border-radius: 12px; background: var(--card); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px; }
th, td { padding: 8px 16px; text-align: right; vertical-align: middle; border-top: 1px solid var(--rule); white-space: nowrap; }
tbody th .interval { white-space: normal; max-width: 250px; margin-top: 2px; }
thead th { border-top: 0; font-weight: 600; font-size: 13px; color: var(--soft); background: var(--wash); vertical-align: bottom; }
th:first-child { text-align: left; font-weight: 550; position: sticky; left: 0; background: var(--card); z-index: 1; }
thead th:first-child { background: var(--wash); }
td .interval, th .interval { display: block; font-weight: 400; font-size: 12px; color: var(--soft); line-height: 1.2; }
td.strip-cell { width: 30%; }
tr.total th, tr.total td.score { font-weight: 680; }
td.score { font-size: 15px; } td.interval-cell { color: var(--soft); font-size: 13px; padding-left: 0; }
td.strip-cell, th.strip-cell { padding-left: 24px; padding-right: 24px; } th.strip-cell { font-weight: 400; }
th.strip-cell span { display: flex; justify-content: space-between; }
tr.split th { background: var(--wash); color: var(--soft); font-size: 13px; font-weight: 600; padding: 6px 16px; }
tr.control th, tr.control td { color: var(--soft); border-top-color: transparent; padding-top: 2px; padding-bottom: 8px; }
tr.control th { padding-left: 30px; font-weight: 400; }
sup { font-size: 10px; line-height: 0; margin-left: 1px; }
.protocol { margin-top: 10px; font-size: 13px; color: var(--soft); }
.protocol summary { cursor: pointer; }
.protocol li { margin: 6px 0 0 18px; overflow-wrap: anywhere; }

/* cards with pictures */
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(316px, 1fr)); gap: 16px; margin-top: 18px; }
.cards.narrow { grid-template-columns: repeat(auto-fill, minmax(204px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 16px; display: flex; flex-direction: column; gap: 12px; min-width: 0; }
.card .prompt { font-size: 14px; line-height: 1.45; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.pair.one { grid-template-columns: minmax(0, 136px); }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--rule); background: var(--wash); }
img.pixelated { image-rendering: pixelated; }
figcaption { font-size: 12px; color: var(--soft); margin-top: 4px; display: flex; justify-content: space-between; gap: 6px; }
.verdict { list-style: none; font-size: 13px; line-height: 1.4; display: grid; gap: 3px; }
.verdict li { display: grid; grid-template-columns: 18px 1fr; }
.verdict .sign { font-weight: 700; }
.verdict del { text-decoration: none; color: var(--soft); }
.badge { align-self: start; font-size: 12px; font-weight: 600; border-radius: 99px; padding: 1px 9px; border: 1px solid currentColor; }
.qa { display: grid; grid-template-columns: 116px 1fr; gap: 16px; }
.qa ul { list-style: none; display: grid; gap: 9px; align-content: start; font-size: 13.5px; line-height: 1.35; }
.qa li { display: grid; grid-template-columns: 18px 1fr; }
.qa b { font-weight: 640; }

/* charts */
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 16px; margin-top: 18px; }
.chart { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 14px 12px 6px 14px; }
.chart h3 { font-size: 14px; display: flex; justify-content: space-between; gap: 12px; align-items: baseline; padding-right: 4px; }
.chart h3 .soft { font-weight: 400; font-size: 13px; }
.chart.wide { padding: 18px 18px 8px; margin-top: 18px; }
svg { display: block; width: 100%; height: auto; }
.chart svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; fill: var(--soft); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
svg .dashed { stroke-dasharray: 4 3.5; }
svg .dot.target { fill-opacity: 0; } svg .dot.target:hover { fill-opacity: 1; }
svg .equal { stroke: var(--soft); stroke-dasharray: 3 3; }
svg .area { fill-opacity: .85; }
.s0 { --tone: var(--s0); } .s1 { --tone: var(--s1); } .s2 { --tone: var(--s2); }
.s3 { --tone: var(--s3); } .s4 { --tone: var(--s4); } .s5 { --tone: var(--s5); }
svg .line { stroke: var(--tone); } svg .dot, svg .area { fill: var(--tone); }
.toggle { position: absolute; opacity: 0; }
.toggle + label { cursor: pointer; font-size: 13px; color: var(--soft); border: 1px solid var(--rule); padding: 3px 14px; display: inline-block; margin-top: 14px;
  background: var(--card); }
.toggle.first + label { border-radius: 8px 0 0 8px; } .toggle.second + label { border-radius: 0 8px 8px 0; border-left: 0; }
.toggle:checked + label { background: var(--wash); color: var(--ink); font-weight: 600; }
.as-log { display: none; }
#log:checked ~ .charts .as-log { display: block; } #log:checked ~ .charts .as-linear { display: none; }
.drawing { border: 1px solid var(--rule); border-radius: 12px; margin-top: 18px; overflow-x: auto; }
.drawing svg { min-width: 900px; }

/* provenance */
.chain { list-style: none; margin-top: 20px; }
.chain > li { position: relative; padding: 0 0 22px 34px; }
.chain > li::before { content: ""; position: absolute; left: 5px; top: 7px; width: 11px; height: 11px; border-radius: 50%; background: var(--paper);
  border: 2.5px solid var(--accent); }
.chain > li::after { content: ""; position: absolute; left: 11px; top: 22px; bottom: -3px; width: 1.5px; background: var(--rule); }
.chain > li:last-child { padding-bottom: 0; } .chain > li:last-child::after { display: none; }
.chain pre { margin: 7px 0 0; padding: 9px 12px; background: var(--wash); border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
.chain .facts { color: var(--soft); font-size: 13px; margin-top: 6px; overflow-wrap: anywhere; }
.machine { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 14px 28px; margin-top: 32px; padding-top: 22px; border-top: 1px solid var(--rule); font-size: 14px; }
.machine .wide { grid-column: 1 / -1; }
.facts-list { display: grid; gap: 14px; align-content: center; font-size: 14px; padding: 0 8px; } .facts-list dt { color: var(--soft); font-size: 13px; }
.machine dt { color: var(--soft); font-size: 13px; } .machine dd { overflow-wrap: anywhere; }
details.recipe { margin-top: 18px; } details.recipe summary { cursor: pointer; color: var(--accent); }
details.recipe pre { background: var(--wash); border-radius: 8px; padding: 14px; overflow-x: auto; max-height: 520px; }
footer { margin-top: 64px; padding-top: 18px; border-top: 1px solid var(--rule); color: var(--soft); font-size: 13px; }

@media (max-width: 640px) {
  .page { padding: 0 16px 48px; }
  header { padding: 30px 0 20px; }
  h1 { font-size: 29px; } .lead { font-size: 16px; }
  section { padding-top: 42px; }
  .cards, .charts { grid-template-columns: minmax(0, 1fr); }
  .cards.narrow { grid-template-columns: 1fr 1fr; gap: 10px; } .cards.narrow .card { padding: 10px; }
  th, td { padding: 8px 10px; } tbody th { white-space: normal; min-width: 118px; }
  .qa { grid-template-columns: 92px 1fr; gap: 12px; }
  nav { flex-wrap: nowrap; overflow-x: auto; gap: 18px; margin-right: -16px; scrollbar-width: none; }
  nav a { white-space: nowrap; }
  td.strip-cell { min-width: 150px; }
}
"""
