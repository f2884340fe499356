"""The style sheet of the benchmark's page: light, dark and paper, wide and narrow."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--ink:#1b2330;--soft:#5b6675;--line:#d9dee5;
--kvmhv:#1d5fd1;--raw:#647081;--virsh:#c2410c;--good:#116b3f;--bad:#a3161f;--bad-bg:#fde5e6}
@media (prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1a2029;--ink:#e6eaf0;--soft:#9aa6b5;--line:#303947;
--kvmhv:#6aa4ff;--raw:#8d98a5;--virsh:#ff8a4c;--good:#7ee2ac;--bad:#ff9a9f;--bad-bg:#431a1d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:28px;line-height:1.2;margin:2px 0 8px}
h2{font-size:19px;margin:40px 0 10px}
h3{font-size:15px;margin:18px 0 4px}
p{margin:0 0 12px;overflow-wrap:anywhere}
small{color:var(--soft)}
.wide{overflow-x:auto}
table{border-collapse:collapse;margin:.4em 0 1em}
td,th{padding:.25em .8em .25em 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.yes{color:var(--good)}
.no{color:var(--bad);font-weight:600}
.missed{border-left:4px solid var(--bad);background:var(--bad-bg);padding:8px 14px;margin:0 0 12px;
border-radius:0 6px 6px 0}
.missed p{margin:0 0 6px}
.effects .track{width:160px}
.effects th.n{max-width:190px;white-space:normal}
.plot{display:grid;grid-template-columns:minmax(180px,330px) 1fr 76px;gap:4px 12px;align-items:center}
.way{text-align:right;font-size:13px}
.track{position:relative;height:16px;margin:0 4px}
.track b{position:absolute;left:0;top:1px;height:14px;opacity:.3;background:currentColor;border-radius:2px}
.track i{position:absolute;top:5px;width:6px;height:6px;margin-left:-3px;border-radius:50%;background:currentColor}
.kvmhv{color:var(--kvmhv)}
.raw{color:var(--raw)}
.virsh{color:var(--virsh)}
@media (max-width:640px){
main{padding:20px 14px 40px}
.plot{grid-template-columns:minmax(0,1fr) 70px}
.way{text-align:left;grid-column:1/-1;margin-top:4px}
td,th{padding-right:.5em}
.comparisons,.comparisons tbody{display:block}
.comparisons tr{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr) minmax(0,1.4fr);gap:0 12px;
border-bottom:1px solid var(--line);padding:6px 0}
.comparisons tr:first-child{display:none}
.comparisons td{border:0;padding:0}
.comparisons td.of{grid-column:1/-1}
.comparisons td.figure{grid-column:2/-1;text-align:right}
.comparisons td.n{text-align:left}
}
@media print{:root{color-scheme:light}.plot{break-inside:avoid}}
"""
