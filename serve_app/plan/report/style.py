"""How the page looks: on screens light and dark, wide and narrow, and on paper."""

from serve_app.plan.report.markup import Html

_HATCH = "repeating-linear-gradient(135deg,transparent 0 4px,var(--hatch) 4px 6px)"

# Of a GPU in the map: its style, and the sign before its number.
LOOKS: dict[str, tuple[str, str]] = {
    "lost": ("background:var(--lost);color:var(--on-lost);border-color:var(--lost);font-weight:700", "✕"),
    "rests": (f"background:{_HATCH},var(--rests);color:var(--ink);border-color:var(--rests-line)", "■"),
    "pauses": ("background:var(--pauses);color:var(--ink);border-color:var(--pauses-line)", "‖"),
    "serves": ("background:var(--serves);color:var(--ink);border-color:var(--serves-line)", "▸"),
    "spare": ("background:none;color:var(--muted);border:1px dashed var(--muted)", "+"),
}

_COLOURS = """
:root{--ground:#fbfaf7;--sheet:#fff;--ink:#1d2024;--muted:#585f69;--line:#dcdad3;--accent:#1d5a9e;--soft:#eef2f7;
--good:#1c6b3f;--bad:#a3201a;--hatch:#0003;
--lost:#a3201a;--on-lost:#fff;--rests:#f6c67f;--rests-line:#b97a1a;--pauses:#cfe0f5;--pauses-line:#7ba3d4;
--serves:#d4ecd8;--serves-line:#7dba89;
--runtime:#b9bcc2;--dense:#2f4b7c;--experts:#4a7fc1;--vocabulary:#9dc3ea;--standby:#4a7fc1;--step:#e0a43b;--kv:#4d9d74;
--compute:#4a7fc1;--bandwidth:#4d9d74;--link:#e0a43b;--fixed:#9a9fa7}
@media screen and (prefers-color-scheme:dark){:root{--ground:#15181c;--sheet:#1c2026;--ink:#e6e8eb;--muted:#a6aeb9;
--line:#353c45;--accent:#86b7f0;--soft:#242a32;--good:#7fd09b;--bad:#ff9c92;--hatch:#0006;
--lost:#ff8a7e;--on-lost:#2a0503;--rests:#87591a;--rests-line:#d99a3d;--pauses:#2c4666;--pauses-line:#5f8cc2;
--serves:#234530;--serves-line:#4f9465;
--runtime:#7d848e;--dense:#7c97c9;--experts:#4a7fc1;--vocabulary:#b3d2f2;--standby:#4a7fc1;--step:#d0973a;--kv:#4d9d74;
--compute:#5b8fd0;--bandwidth:#4d9d74;--link:#d0973a;--fixed:#7d848e}}
"""

_TEXT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;padding:1.6rem 1.2rem 4rem;max-width:68rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2;margin:.1rem 0 .7rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .6rem;scroll-margin-top:1rem}
h3{font-size:1rem;margin:1.6rem 0 .4rem}
h4{font-size:.85rem;margin:0 0 .4rem;color:var(--muted);font-weight:600}
p{margin:.5rem 0;max-width:60rem}
a{color:var(--accent)}
small,.note,figcaption{font-size:.85rem;color:var(--muted)}
.over{color:var(--muted);font-size:.85rem;margin:0;letter-spacing:.04em}
section{background:var(--sheet);border:1px solid var(--line);border-radius:10px;padding:1.2rem 1.3rem;margin:1.2rem 0}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1.2rem 0;font-size:.95rem}
.verdict{font-weight:600}.verdict.good{color:var(--good)}.verdict.bad{color:var(--bad)}
.lead{font-size:1.02rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.7rem;margin:1.1rem 0 0}
.tiles>div{background:var(--sheet);border:1px solid var(--line);border-radius:10px;padding:.7rem .85rem;
display:flex;flex-direction:column}
.tiles span{font-size:.85rem;color:var(--muted)}.tiles b{font-size:1.45rem;line-height:1.3}
ul{margin:.5rem 0;padding-left:1.2rem}
li{margin:.25rem 0}
details{margin:.7rem 0}
summary{cursor:pointer;color:var(--accent);font-weight:600}
.badge{font-size:.72rem;font-weight:600;border:1px solid;border-radius:99px;padding:.05rem .5rem;white-space:nowrap}
.badge.chosen{color:var(--accent)}.badge.better{color:var(--good)}
"""

_TABLES = """
.scroll{overflow-x:auto;margin:.6rem 0}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
caption{text-align:left;font-weight:600;padding:.2rem 0 .35rem}
th,td{text-align:left;vertical-align:top;padding:.32rem .7rem .32rem 0;border-bottom:1px solid var(--line)}
thead th{color:var(--muted);font-weight:600;vertical-align:bottom;font-size:.82rem}
tbody th{font-weight:600}
.number{text-align:right}
td.number{white-space:nowrap}
#losses>.scroll table{min-width:56rem}
#layouts tbody th{white-space:nowrap}#layouts .badge{display:block;width:max-content;margin-top:.15rem}
#layouts th,#layouts td{padding-right:.6rem}
#layouts td:last-child{min-width:13rem}
.timeline th{white-space:nowrap}
#losses td:nth-child(2){white-space:nowrap}
#audit table{min-width:42rem}#audit td:last-child{width:45%}#audit td:nth-child(4){min-width:8rem}
#audit th small{display:block;font-weight:400}
#sources td:last-child{min-width:9rem}
"""

_DRAWINGS = """
figure{margin:.8rem 0}
.plot{width:100%;height:auto;display:block}
.plot text{font-size:12px;fill:var(--muted)}
.plot .axis{font-size:13px;fill:var(--ink)}
.plot .grid{stroke:var(--line)}
.plot line.limit{stroke:var(--bad);stroke-dasharray:5 4}.plot text.limit{fill:var(--bad)}
.plot .leader{stroke:var(--ink)}
.plot text.label{fill:var(--ink);font-weight:700;paint-order:stroke;stroke:var(--sheet);stroke-width:4px}
.mark{stroke:var(--accent);stroke-width:1.6;fill:none}
.mark.behind{stroke:var(--muted);fill:var(--sheet);fill-opacity:.35}
.mark.front{fill:var(--accent);fill-opacity:.55}
.mark.missing{stroke-dasharray:3 2}
.mark.chosen{stroke:var(--ink);stroke-width:3}.mark.better{stroke:var(--good);stroke-width:3}
.narrow{display:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;padding:0;margin:.4rem 0;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.4rem;margin:0}
.key{width:30px;height:30px;flex:none}
.swatch{width:.8rem;height:.8rem;border-radius:2px;flex:none;border:1px solid #0003}
.held{margin:1rem 0 1.3rem}
.held h3{display:flex;flex-wrap:wrap;align-items:center;gap:.2rem .6rem;margin:0 0 .35rem}
.total{margin-left:auto;font-weight:400;font-size:.9rem;color:var(--muted)}
.memory{position:relative;display:flex;height:2rem;background:var(--soft);border-radius:4px}
.memory i{min-width:1px;overflow:hidden;border-right:1px solid var(--sheet);font-style:normal;display:flex;
align-items:center}
.memory i span{background:var(--sheet);color:var(--ink);border-radius:3px;font-size:.75rem;padding:0 .3rem;
margin:0 .3rem;white-space:nowrap}
.memory b{position:absolute;top:-5px;bottom:-5px;border-left:2px solid var(--ink)}
.track{display:block;position:relative;height:1rem;min-width:6rem;background:var(--soft);border-radius:3px;margin-top:.2rem}
.track i{position:absolute;top:0;bottom:0;min-width:2px;border-radius:2px}
.phase{background:var(--accent)}
.timeline table,.ops table{table-layout:auto}
.timeline td:nth-child(2){width:40%}.ops td:nth-child(3){width:45%}
.timeline,.ops{margin:1.1rem 0}
.bound-compute{background:var(--compute)}.bound-memory{background:var(--bandwidth)}.bound-link{background:var(--link)}
.bound-fixed{background:var(--fixed)}
"""

_MAP = """
.choice{margin:1.4rem 0 0;border-top:1px solid var(--line);padding-top:.8rem}
.choice>input,.pick>input{position:absolute;opacity:0;width:1px;height:1px;pointer-events:none}
.legend-of{margin:.2rem 0 .5rem}
.button{display:inline-block;border:1px solid var(--line);border-radius:99px;padding:.3rem .85rem;
margin:0 .4rem .5rem 0;cursor:pointer;font-size:.92rem;background:var(--sheet)}
input:checked+.button{background:var(--accent);color:var(--sheet);border-color:var(--accent);font-weight:600}
input:focus-visible+.button{outline:3px solid var(--accent);outline-offset:2px}
.panel,.story,h3.print{display:none}
.taken{display:grid;grid-template-columns:minmax(0,auto) minmax(14rem,1fr);gap:.8rem 2.2rem;align-items:start;
margin:.8rem 0}
.map{display:flex;flex-wrap:wrap;gap:1rem 1.6rem}
.cell{border:1px solid var(--line);border-radius:8px;padding:.6rem .75rem}
.stage{display:flex;gap:.3rem .9rem;align-items:flex-start;margin:.35rem 0}
.stage .name{flex:none;width:7.6rem;line-height:1.25;padding-top:.15rem}.stage .name b{font-size:.85rem}
.stage .name small{display:block;font-size:.75rem}
.replicas{display:flex;flex-wrap:wrap;gap:.35rem .9rem}
.replica{display:flex;flex-wrap:wrap;gap:3px;align-items:center}
.replica small{font-size:.72rem;min-width:1.5rem}
.gpu{display:inline-flex;flex-direction:column;align-items:center;justify-content:center;width:2.15rem;height:2.35rem;
font-size:.8rem;line-height:1.15;border:1px solid;border-radius:4px;flex:none}
.gpu::before{font-size:.72rem;line-height:1}
.pick .map .gpu{cursor:pointer}
.small .stage{margin:.8rem 0}
.small .gpu{width:1.05rem;height:1.05rem;font-size:0}.small .gpu::before{font-size:.65rem}
.gpu.key{width:1.5rem;height:1.5rem;font-style:normal;font-weight:400}
.fates{list-style:none;padding:0;margin:0;font-size:.92rem}
.fates li{display:flex;gap:.6rem;align-items:flex-start;margin:0 0 .5rem}
.told p{margin:.3rem 0}
"""

_NARROW = """
@media screen and (max-width:40rem){
body{padding:1rem .7rem 3rem;font-size:15px}
section{padding:.9rem .8rem;border-radius:8px}
h1{font-size:1.35rem}
.wide{display:none}.narrow{display:block}
.taken{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:1fr 1fr;gap:.5rem}.tiles b{font-size:1.2rem}
.cell{padding:.5rem}
.stage{flex-direction:column}.stage .name{width:auto}.stage .name small{display:inline;margin-left:.6rem}
.gpu{width:1.95rem}
.timeline td:nth-child(4),.timeline th:nth-child(4){display:none}
.timeline td:nth-child(2){width:55%}
.scroll tbody th{min-width:6rem}table{font-size:.85rem}th,td{padding-right:.5rem}.memory i span{display:none}
#layouts tbody th{white-space:normal}
}
"""

_PAPER = """
@media print{
body{max-width:none;padding:0;font-size:10pt;background:none}
section{border:0;padding:0;break-inside:auto}
h2,h3,caption{break-after:avoid}
tr,.held,.cell,figure{break-inside:avoid}
nav,.choice>input,.button,.legend-of{display:none}
.panel,h3.print{display:block}
.scroll{overflow:visible}.scroll table{min-width:0!important;font-size:7.5pt}
.scroll td,.scroll th{min-width:0!important;font-size:7.5pt;
white-space:normal!important}
details::details-content{content-visibility:visible;display:block;height:auto}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
}
"""


def _fates() -> str:
    return "".join(
        f'.gpu.{fate}{{{style}}}.gpu.{fate}::before{{content:"{sign}"}}\n' for fate, (style, sign) in LOOKS.items()
    )


def _kinds() -> str:
    """Standby slots hold experts, in stripes."""
    names = ("runtime", "dense", "experts", "vocabulary", "step", "kv")
    plain = "".join(f".{name}{{background:var(--{name})}}" for name in names)
    return plain + f".standby{{background:{_HATCH},var(--standby)}}\n"


def _panels(most: int = 8) -> str:
    shown = ",".join(f"#loss-{i}:checked~.panel-{i}" for i in range(most))
    return f"@media screen{{{shown}{{display:block}}}}\n"


STYLE = Html(_COLOURS + _TEXT + _TABLES + _DRAWINGS + _MAP + _fates() + _kinds() + _panels() + _NARROW + _PAPER)
