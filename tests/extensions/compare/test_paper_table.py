"""Tables for papers: Markdown and LaTeX with any text in their cells."""

import re
import shutil
import subprocess

import pytest

from dinoseg.extensions.compare.paper_table import PaperTable, Score, format_score, write_paper_tables

UGLY = r"a_b&c%d#e$f{g}h~i^j\k<l>m|n\"o*p[q]`r'"


def write(folder, *tables):
    write_paper_tables(folder, tables)
    return (folder / "table.md").read_text(encoding="utf-8"), (folder / "table.tex").read_text(encoding="utf-8")


def cells_of(row):
    """Return the cells of a row of LaTeX: divided at unescaped ampersands."""
    return [cell.strip() for cell in re.split(r"(?<!\\)&", row.removesuffix(r"\\"))]


def test_scores_have_deviation_interval_and_two_seeds():
    def show(*score):
        return format_score(Score(*score), "{:.2f}".format)

    assert show(80.123, 0.45, [79, 81.24], 2) == "80.12 ± 0.45 [79.00, 81.24] (2 seeds)"
    assert show(80.123, 0.45, [79, 81.24], 3) == "80.12 ± 0.45 [79.00, 81.24]"
    assert show(80.123, None, None, 2) == "80.12" and show(None, 0.45, [1, 2], 2) == "-"


def test_table_is_booktabs_with_bold_and_minus_signs(tmp_path):
    rows = [["lr=1e-4", "80.12 ± 0.45 [79.00, 81.24] (2 seeds)", "-1.20"], ["[1,2]", "-", "[-1.20, +0.30]"]]
    table = PaperTable("50 % of a_b.", ["side", "mIoU %", "x_y"], rows, 1, [(0, 1)], ["job 1 failed:\n100 %"])
    markdown, latex = write(tmp_path, table)
    lines = [line.strip() for line in latex.splitlines()]
    assert [line for line in lines if line.startswith(("\\top", "\\mid", "\\bot"))] == [
        *("\\toprule", "\\midrule", "\\bottomrule")
    ]
    assert r"\begin{tabular}{lrr}" in lines and r"\caption{50 \% of a\_b.}" in lines
    first, second = (cells_of(line) for line in lines if line.endswith(r"\\") and not line.startswith("side"))
    stacked = r"\shortstack[r]{\textbf{80.12} $\pm$ 0.45\\\scriptsize {[}79.00, 81.24{]} (2 seeds)}"
    assert first == ["lr=1e-4", stacked, "$-$1.20"] and second == ["{[}1,2{]}", "-", "{[}$-$1.20, +0.30{]}"]
    assert lines[0].startswith("%") and "booktabs" in lines[0] and lines[-1] == "% job 1 failed: 100 %"
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    assert shown[0] == ["side", "mIoU %", "x\\_y"] and shown[2][1] == "**80.12** ± 0.45 [79.00, 81.24] (2 seeds)"
    assert markdown.startswith("50 % of a\\_b.\n") and markdown.endswith("\njob 1 failed: 100 %\n")


def test_any_text_is_one_cell(tmp_path):
    markdown, latex = write(tmp_path, PaperTable(UGLY, [UGLY, "b"], [[UGLY, "1\n2"], ["", UGLY]], notes=[UGLY]))
    body = [line.strip() for line in latex.splitlines() if line.endswith(r"\\")]
    assert [len(cells_of(line)) for line in body] == [2, 2, 2]
    plain = re.sub(r"\\[&%$#_{}]", "", latex)
    assert plain.count("{") == plain.count("}")
    assert not re.search(r"(?<!\\)[#$^~<>|*]", re.sub(r"\{\*\}|%.*", "", plain))
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 4 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs LaTeX")
def test_latex_compiles(tmp_path):
    write(tmp_path, PaperTable(UGLY, [UGLY, "b"], [["[1]", "1.00 ± 2 [1, 2]"], ["*", UGLY]], 1, [(0, 1)], [UGLY]))
    frame = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
    (tmp_path / "main.tex").write_text(frame, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
