"""The looks of the page: one style sheet, light and dark, no font and no script from elsewhere."""

CSS = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, monospace;
  --page: #f6f7f9; --card: #ffffff; --ink: #161b26; --muted: #5b6577; --line: #e3e7ee; --soft: #eef1f6;
  --accent: #2f6bff; --warn: #b54708; --warn-soft: #fff4e5;
  --s0: #8a93a3; --s1: #2f6bff; --s2: #e4572e; --s3: #0a9b6c;
  --s4: #b25cd6; --s5: #c98a00; --s6: #1f9fd0; --s7: #d6478c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1218; --card: #171b24; --ink: #e8ecf4; --muted: #9aa5b8; --line: #2a3140; --soft: #1f2531;
    --accent: #7aa2ff; --warn: #fdb022; --warn-soft: #2b2213;
    --s0: #7f8aa0; --s1: #7aa2ff; --s2: #ff8a66; --s3: #3fcf9b;
    --s4: #d08bf0; --s5: #f0bb45; --s6: #5cc8ef; --s7: #f57fb6;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
header { margin-bottom: 28px; }
.brand { color: var(--muted); font-size: 13px; letter-spacing: .02em; margin: 0 0 10px; }
h1 { font-size: clamp(24px, 4.6vw, 36px); line-height: 1.15; letter-spacing: -.02em; margin: 0;
  overflow-wrap: anywhere; }
h1 .against { color: var(--muted); font-weight: 500; }
.lead { font-size: clamp(16px, 2.2vw, 19px); color: var(--muted); margin: 14px 0 0; max-width: 62ch; }
.lead b { color: var(--ink); font-weight: 600; }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 22px 0 8px; }
section { margin-top: 40px; }
.note { color: var(--muted); font-size: 13.5px; margin: 10px 0 0; max-width: 80ch; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(208px, 1fr)); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 16px 18px; }
.headline .label { color: var(--muted); font-size: 13px; }
.headline .value { font-size: 27px; font-weight: 650; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.headline .value.word { font-size: 19px; line-height: 1.78; white-space: normal; }
.headline .detail { color: var(--muted); font-size: 13px; min-height: 1.5em; }
.bar { height: 6px; border-radius: 3px; background: var(--soft); margin-top: 10px; overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.plot { padding: 14px; margin-top: 16px; }
.plot svg { display: block; width: 100%; max-width: 660px; height: auto; margin: 0 auto; color: var(--ink); }
.plot.wide svg { min-width: 560px; max-width: 900px; }
.plot.wide, .scroll { overflow-x: auto; }
.plot h3 { margin: 2px 4px 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--muted); font-weight: 500; font-size: 12.5px; white-space: nowrap; }
th, td { padding: 8px 10px; border-bottom: 1px solid var(--line); }
td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 4px;
  position: sticky; left: 0; background: var(--card); }
tr:last-child td { border-bottom: 0; }
.baseline td { color: var(--muted); }
.card.table { padding: 8px 14px; margin-top: 16px; }
.warning { border-left: 4px solid var(--warn); background: var(--warn-soft); border-radius: 8px; padding: 10px 14px;
  margin-top: 12px; font-size: 14.5px; overflow-wrap: anywhere; }
.warning b { color: var(--warn); }
.sample { margin-top: 16px; }
.prompt { font-weight: 600; margin: 0 0 10px; overflow-wrap: anywhere; }
.prompt::before { content: "\\201C"; color: var(--muted); } .prompt::after { content: "\\201D"; color: var(--muted); }
.said { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px; }
.said h4 { margin: 0 0 4px; font-size: 13px; font-weight: 500; color: var(--muted); }
.said p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 15px; }
.said .same { color: var(--muted); }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--accent); font-size: 14.5px; }
pre { background: var(--soft); border-radius: 10px; padding: 12px 14px; overflow-x: auto; font: 13px/1.5 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
code { font-family: var(--mono); font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 18px; margin: 14px 0 0; font-size: 14px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: 13px; margin-top: 48px; }
@media (max-width: 520px) {
  main { padding: 24px 14px 48px; }
  .grid { grid-template-columns: 1fr 1fr; gap: 10px; }
  .headline { padding: 12px 13px; } .headline .value { font-size: 21px; } .headline .value.word { font-size: 16px; }
  .plot { padding: 10px; } section { margin-top: 32px; }
  dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 8px; }
}
@media print { body { background: none; } .card { break-inside: avoid; } details[open] summary { display: none; } }
"""
