"""The style sheet of a move's page: light, dark and paper."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--ink:#1b2330;--soft:#5b6675;--line:#d9dee5;
--setup:#647081;--storage:#0f766e;--memory:#1d5fd1;--state:#c2410c;--cleanup:#6d5bb5;--on:#fff;
--good:#116b3f;--good-bg:#dcf5e7;--bad:#a3161f;--bad-bg:#fde5e6;--warn:#8a5200;--warn-bg:#fdf0d5}
@media (prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1a2029;--ink:#e6eaf0;--soft:#9aa6b5;--line:#303947;
--setup:#77828f;--storage:#2fb5a8;--memory:#6aa4ff;--state:#ff8a4c;--cleanup:#a99af0;--on:#10151c;
--good:#7ee2ac;--good-bg:#143524;--bad:#ff9a9f;--bad-bg:#431a1d;--warn:#ffc766;--warn-bg:#3c2c10}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:980px;margin:0 auto;padding:36px 24px 60px}
h1{font-size:30px;line-height:1.2;margin:2px 0 8px;overflow-wrap:anywhere}
h1 .way{color:var(--soft);font-weight:500;white-space:nowrap}
h2{font-size:18px;margin:0 0 12px}
section{margin-top:36px}
p{margin:0 0 12px}
code{font:13px ui-monospace,monospace;color:var(--soft);overflow-wrap:anywhere}
.above{color:var(--soft);margin:0}
.under{color:var(--soft)}
.reason{border-left:4px solid var(--bad);background:var(--bad-bg);padding:10px 14px;border-radius:0 6px 6px 0}
.reason.cancelled{border-color:var(--warn);background:var(--warn-bg);color:inherit}
.badge{display:inline-block;padding:1px 10px;border-radius:99px;font-size:13px;font-weight:600;margin-right:6px;
background:var(--card);color:var(--ink)}
.badge.done{background:var(--good-bg);color:var(--good)}
.badge.failed,.badge.error,.badge.needs-operator{background:var(--bad-bg);color:var(--bad)}
.badge.cancelled,.badge.warning{background:var(--warn-bg);color:var(--warn)}
.figures{display:grid;grid-template-columns:repeat(4,1fr);gap:10px;margin:24px 0 0}
.figures div{background:var(--card);border-radius:8px;padding:12px 14px;break-inside:avoid}
.figures dt{color:var(--soft);font-size:13px}
.figures dd{margin:0;font-size:20px;font-weight:600;white-space:nowrap;font-variant-numeric:tabular-nums}
.figures .note{font-size:12.5px;font-weight:400}
.note{color:var(--soft)}
.plot{margin-bottom:14px}
.scroll{overflow-x:auto;margin-bottom:14px}
.scroll:focus-visible{outline:3px solid var(--memory);outline-offset:2px}
.narrow{display:none}
svg{display:block;width:100%;height:auto}
svg text{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--soft)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--soft);font-size:13px}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th.figure,td.figure{text-align:right;white-space:nowrap}
td.figure+td:not(.figure),th.figure+th:not(.figure){padding-left:12px}
th:last-child,td:last-child{padding-right:0}
.pairs td:first-child{color:var(--soft);width:11em}
.nowrap{white-space:nowrap}
.swatch{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:8px}
.phase-setup{fill:var(--setup);background:var(--setup)}
.phase-storage{fill:var(--storage);background:var(--storage)}
.phase-memory{fill:var(--memory);background:var(--memory)}
.phase-state{fill:var(--state);background:var(--state)}
.phase-pages{fill:var(--memory);background:var(--memory)}
.phase-cleanup{fill:var(--cleanup);background:var(--cleanup)}
svg .on-phase{fill:var(--on);font-weight:600}
svg .name{font-weight:600;fill:var(--ink)}
svg .axis,svg .ms{text-anchor:end}
svg .ms,svg .row{fill:var(--ink)}
svg .pass-number{text-anchor:middle;font-size:11px}
.grid{stroke:var(--line);stroke-width:1}
.pass{stroke:var(--line);stroke-width:1;stroke-dasharray:2 3}
.area{fill:var(--memory);opacity:.14}
.line-remaining,.line-sent,.line-dirty{fill:none;stroke-width:2;stroke-linejoin:round}
.line-remaining,.line-sent{stroke:var(--memory)}
.line-dirty{stroke:var(--state)}
svg .key-sent{fill:var(--memory)}
svg .key-dirty{fill:var(--state)}
.step{fill:var(--state)}
.gap{fill:var(--storage)}
@media screen and (max-width:640px){main{padding:20px 14px 40px}h1{font-size:24px}
.figures{grid-template-columns:1fr 1fr}.figures dd{font-size:19px}.wide{display:none}.narrow{display:block}
th,td{padding-right:9px;font-size:14px}th{font-size:12.5px}.pairs td:first-child{width:7.5em}}
@media print{:root{color-scheme:light;--bg:#fff;--card:#f3f4f6;--ink:#111;--soft:#444;--line:#ccc;--on:#fff;
--setup:#777;--storage:#0f766e;--memory:#1d5fd1;--state:#c2410c;--cleanup:#6d5bb5;--good:#116b3f;--bad:#a3161f;
--warn:#8a5200;--good-bg:#fff;--bad-bg:#fff;--warn-bg:#fff}
body{font-size:10pt}main{max-width:none;padding:0}section{margin-top:18px}h1{font-size:22pt}.figures{margin-top:14px}
.figures div{padding:8px 12px}.figures dd{font-size:13pt}th,td{padding-top:3px;padding-bottom:3px}
.plot,tr{break-inside:avoid}h2,section>p{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
@page{margin:16mm}
"""
