"""The style sheet of the report: light and dark by the reader's own setting, nothing loaded from elsewhere."""

CSS = """
:root { color-scheme: light dark; --paper: #fbfbfd; --card: #fff; --ink: #1b2230; --soft: #667085; --line: #e3e7ee;
  --k0: #2f6fb5; --k1: #e4572e; --k2: #2a9d7f; --k3: #b0579b; --k4: #d59b1a; --k5: #5a6b8c; --k6: #7fb2dd;
  --k7: #8c6d46; }
@media (prefers-color-scheme: dark) { :root { --paper: #12151c; --card: #1a1f29; --ink: #e6e9f0; --soft: #98a2b5;
  --line: #2c3341; --k0: #6aa5e6; --k1: #ff8562; --k2: #4fc6a5; --k3: #d68bc6; --k4: #f0be4f; --k5: #9aa9c7;
  --k6: #a9d1f5; --k7: #c4a37a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 60px; }
h1 { font-size: 27px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 38px 0 10px; }
.sub { color: var(--soft); margin: 2px 0 22px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(195px, 1fr)); gap: 12px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.tile span, .note, figcaption { color: var(--soft); font-size: 13px; }
.card { overflow-x: auto; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; } svg .strong { fill: var(--ink); font-weight: 600; }
svg .grid { stroke: var(--line); }
.k0 { fill: var(--k0); background: var(--k0); } .k1 { fill: var(--k1); background: var(--k1); }
.k2 { fill: var(--k2); background: var(--k2); } .k3 { fill: var(--k3); background: var(--k3); }
.k4 { fill: var(--k4); background: var(--k4); } .k5 { fill: var(--k5); background: var(--k5); }
.k6 { fill: var(--k6); background: var(--k6); } .k7 { fill: var(--k7); background: var(--k7); }
.s0 { fill: var(--k5); } .s1 { fill: var(--k6); } .s2 { fill: var(--k1); } rect:hover { opacity: .75; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0 0; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, .left { text-align: left; } td.left { white-space: normal; }
.card + .card { margin-top: 12px; } tbody tr:hover { background: var(--paper); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px; }
figure { margin: 0; } figure img { width: 100%; image-rendering: pixelated; border: 1px solid var(--line);
  border-radius: 6px; display: block; } figcaption { overflow-wrap: anywhere; font-size: 12px; margin-top: 4px; }
"""
