"""The page holds what the run wrote, needs nothing else, and cannot be written to by a model."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from ssp_jax.evaluation.scores import MEANS, SHARES
from ssp_jax.game import rewards
from ssp_jax.report import __main__ as command
from ssp_jax.report import compare, drawing, held_out
from ssp_jax.report import page as report
from ssp_jax.report.curves import Curves, Point


def episode(*turns, stop="answer"):
    return {"turns": [{"who": who, "text": text} for who, text in turns], "stop_reason": stop}


def game(
    question="Which city?",
    fault="",
    reused=False,
    scores=(1.0, 0.0),
    said="<think> so </think>",
    cause="",
):
    found = (
        "search engine",
        '\n<information>Doc 1(Title: "Paris") A city.\n'
        'Doc 2(Title: "Rome") Another.\n</information>\n',
    )
    asked = {"text": question, "answers": ["Paris", "City of Light"], "reused": reused}
    attempts = [
        episode(("solver", "<search> a </search>"), found, ("solver", f"<answer> x{i} </answer>"))
        for i in range(2)
    ]
    return {
        "cause": cause,
        "answer": "Paris",
        "requested_searches": 2,
        "proposer": episode(
            ("proposer", said),
            found,
            ("proposer", f"<question> {question} </question>"),
            stop="question",
        ),
        "documents": [],
        "fault": fault,
        "question": None if fault and not reused else asked,
        "verifier": episode(("verifier", "<answer> Paris </answer>")),
        "attempts": []
        if fault and not reused
        else [a | {"score": s} for a, s in zip(attempts, scores, strict=True)],
        "proposer_reward": 0.5,
    }


def run_folder(folder, steps=3, games=(), judges=("policy", "policy")):
    rows = []
    for step in range(1, steps + 1):
        rows.append(
            {
                "step": step,
                "time": 2.0,
                "seconds": 60.0,
                "reward/solver": 0.1 * step,
                "reward/proposer": None,
            }
        )
        rows[-1] |= {
            "funnel/proposed": 20.0,
            "funnel/well_formed": 10.0,
            "fault/too_short": 2.0,
            "fault/empty": 0.0,
        }
    rows.append({"step": steps, "time": 2.0, "eval/paper/nq/right": 45.0})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "hal'
    )
    (folder / "eval").mkdir()
    for step, right, judge in zip((0, steps), (20.0, 45.0), judges, strict=True):
        row = {name: 30.0 for name in (*SHARES, *MEANS)} | {
            "right": right,
            "right_low": 12.6,
            "right_high": 54.8,
            "n": 100,
        }
        document = {
            "step": step,
            "judge": judge,
            "sets": {"paper/nq": row, "average": row | {"right": right + 1}},
        }
        (folder / "eval" / f"step_{step:06d}.json").write_text(json.dumps(document))
    (folder / "episodes").mkdir()
    for step, records in games:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "episodes" / f"step_{step:06d}.jsonl").write_text(lines)
    return folder


class Page(HTMLParser):
    """Text, addresses and scripts of a page, with its elements checked for their ends."""

    def __init__(self, html):
        super().__init__()
        self.open, self.words, self.sources, self.scripts, self.images = [], [], [], 0, []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        self.scripts += tag == "script"
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_shows_no_secrets(tmp_path):
    """config.json of an earlier version has them."""
    values = {"retriever.url": "http://me:hush@host/retrieve?api_key=hush", "steps": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shown, _ = report.read_config(tmp_path)
    assert "hush" not in shown and json.loads(shown)["steps"] == 3


def test_page(tmp_path, capsys):
    records = [
        game(),
        game("Why?", fault="too_short"),
        game("When?", fault="unverified", cause="wordy", reused=True),
        game("Who?", fault="no_question", cause="loop"),
    ]
    assert command.main([str(run_folder(tmp_path, games=[(2, records)]))]) == 0
    assert "report.html" in capsys.readouterr().out
    page = Page((tmp_path / "report.html").read_text())
    assert page.sources and all(
        source.startswith(("data:image/svg+xml;base64,", "#game-")) for source in page.sources
    )
    text = " ".join(" ".join(page.words).split())
    for expected in (
        "paper/nq 20.0 12.6 to 54.8 45.0 12.6 to 54.8 +25.0 30.0 30.0 30.0 30.0 30 100",
        "average 21.0 12.6 to 54.8 46.0",
        "judged by policy, with 95 % intervals, at the first and the last evaluation",
        "step 2 verified solved 1/2 proposer's reward 0.50 Which city? → Paris",
        "step 2 too short proposer's reward 0.50 Why? → Paris",
        "step 2 reused unverified: wordy solved 1/2 proposer's reward 0.50 When? → Paris",
        "Its question failed (unverified: wordy); played instead",
        "step 2 no question: loop proposer's reward 0.50 Who? → Paris",
        "found: Paris · Rome",
        "Attempt 2 x1 searches: 1, stopped by answer score 0",
        "4 of the 4 games",
        "3 steps, 3.0 minutes",
    ):
        assert expected in text, (expected, text)


def charts_of(folder):
    charts = report._charts(
        report.read_metrics(folder), report.read_evaluations(folder), "what is paid"
    )
    return {chart["title"]: chart for chart in charts}


def test_curves(tmp_path):
    drawn = charts_of(run_folder(tmp_path))
    assert drawn["Rewards"]["note"] == "what is paid"
    assert list(drawn) == [
        "Right answers to held-out questions by policy, %",
        "Rewards",
        "Funnel, % of the questions asked",
        "Questions that failed, by reason",
        "Seconds",
    ]  # of KL and the rest the run wrote nothing
    texts = {title: _svg(chart["image"]) for title, chart in drawn.items()}
    # null at each step
    assert ">solver<" in texts["Rewards"] and ">proposer<" not in texts["Rewards"]
    assert ">too short<" in texts["Questions that failed, by reason"] and ">empty<" not in "".join(
        texts.values()
    )
    assert ">paper/nq<" in texts["Right answers to held-out questions by policy, %"]


def test_evaluations_of_two_judges_are_not_compared(tmp_path):
    """Each has a curve, the last one first, and the table is the last one's."""
    titles = list(charts_of(run_folder(tmp_path, judges=("em", "policy"))))
    assert [title.split(" by ")[1] for title in titles[:2]] == ["policy, %", "em, %"] and titles[
        2
    ] == "Rewards"
    first, last = report._ends(report.read_evaluations(tmp_path))["paper/nq"]
    assert first["right"] == last["right"] == 45.0


def test_what_the_reward_is_stands_in_the_config(tmp_path):
    values = {
        "reward.proposer": "azr",
        "reward.metric": "cover_em",
        "reward.invalid_question": -1.0,
    }
    note = report.reward_note(json.dumps(values))
    assert note == (
        "Proposer (azr): the share of attempts that are wrong, but nothing where all are. A "
        "question that fails earns -1. Solver: share of attempts that are right by cover_em."
    )
    paper = report.reward_note(json.dumps(values | {"reward.proposer": "one_minus_mean"}))
    assert "A question that nobody solves may be hard, or nonsense" in paper
    assert set(report.REWARD_WORDS) == set(rewards.PROPOSER_REWARDS)
    assert report.reward_note("{}") == ""


def test_a_page_says_what_lora_trains(tmp_path):
    workdir = run_folder(tmp_path)
    (workdir / "config.json").write_text("{}")
    assert "LoRA" not in report.page(workdir, 0)
    values = {"lora.rank": 32, "lora.alpha": 32.0, "lora.targets": ["q_proj", "v_proj"]}
    (workdir / "config.json").write_text(json.dumps(values))
    assert "LoRA of rank 32, alpha 32, on 2 projections</p>" in report.page(workdir, 0)
    size = {"lora/parameters": 80_740_352, "lora/share": 0.01049}
    metrics = workdir / "metrics.jsonl"
    first = json.dumps({"step": 1, "seconds": 60.0} | size)
    metrics.write_text(f"{first}\n{metrics.read_text()}")
    text = report.page(workdir, 0)
    assert "2 projections: 80,740,352 of 7,696,887,703 parameters are trained (1.0%)</p>" in text


def test_a_run_that_goes_on_is_shown_with_what_is_whole(tmp_path):
    """Files end in the middle of a line, of a letter, or are empty; a fault that came up later has
    its place.
    """
    run_folder(tmp_path, games=[(2, [game(), game()])])
    row = {"step": 4, "time": 2.0, "seconds": 60.0, "fault/too_long_to_verify": 2.0}
    lines = (tmp_path / "metrics.jsonl").read_text().rpartition("\n")[0]
    half = '{"step": 5, "name": "é'.encode()[:-1]
    (tmp_path / "metrics.jsonl").write_bytes(f"{lines}\n{json.dumps(row)}\n".encode() + half)
    with (tmp_path / "episodes" / "step_000002.jsonl").open("ab") as file:
        file.write(half)
    (tmp_path / "episodes" / "step_000004.jsonl").write_text("")
    for name in ("step_000004.json", "step_000005.json"):
        (tmp_path / "eval" / name).write_text('{"step": 4, "jud' if "4" in name else "")
    steps = report.read_metrics(tmp_path)
    assert [point.step for point in steps.curves.line("Seconds: a whole step")] == [
        1,
        2,
        3,
        4,
    ] and not steps.spoilt
    assert report.read_games(tmp_path, 9).total == 2 and len(report.read_evaluations(tmp_path)) == 2
    assert ">too long to verify<" in _svg(
        charts_of(tmp_path)["Questions that failed, by reason"]["image"]
    )
    assert "4 steps, 4.0 minutes" in report.page(tmp_path, 9)


def _svg(image):
    return re.sub(r"\s*\n\s*", "", base64.b64decode(image.partition(",")[2]).decode())


def test_a_model_cannot_write_html(tmp_path):
    evil = '</pre><script>alert(1)</script><img src="http://x/y">'
    run_folder(tmp_path, games=[(1, [game(question=f"Q {evil}", said=evil)])])
    page = Page(report.page(tmp_path, 10))
    assert page.scripts == 1 and not any("http" in source for source in page.sources)
    assert "alert(1)" in "".join(page.words)


def test_long_runs_are_smoothed_and_games_sampled(tmp_path):
    run_folder(tmp_path, steps=80, games=[(step, [game()] * 7) for step in range(10, 90, 10)])
    games = report.read_games(tmp_path, 16)
    assert games.total == 56
    assert [g["step"] for g in games.shown] == [
        step for step in range(10, 90, 10) for _ in range(2)
    ]
    games = report.read_games(tmp_path, 3)
    # first and last, and between
    assert [g["step"] for g in games.shown] == [10, 50, 80] and games.total == 56
    flat = [Point(step, 1, 5.0, 5.0, 5.0) for step in range(80)]
    axes = drawing.figure()
    drawing.line(axes, "x", flat, 1, "blue")
    # ends included
    assert len(axes.lines) == 2 and set(axes.lines[1].get_ydata().round(9)) == {5.0}


def test_intervals_stand_around_their_points(tmp_path):
    """Error bars: the first is from 12.6 to 54.8, the last a quarter as long, and its lower end is
    higher.
    """
    run_folder(tmp_path)
    found = report.read_evaluations(tmp_path)
    found[1]["sets"]["paper/nq"] |= {"right_low": 40.0, "right_high": 50.55}
    svg = _svg(drawing.draw_evaluations(found))
    bars = re.search(r'<g id="LineCollection_1">(.*?)</g>', svg)[1]
    low, high, last_low, last_high = (float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", bars))
    assert low - high == pytest.approx(4 * (last_low - last_high), rel=1e-3)
    assert low > last_low > last_high > high  # y grows downwards


def words_of(folder):
    return " ".join(" ".join(Page(report.page(folder, 9)).words).split())


def test_a_gain_is_of_two_evaluations_of_the_same_questions(tmp_path):
    """One alone is shown once; where the number of questions has changed both numbers are shown,
    and no gain.
    """
    first = run_folder(tmp_path) / "eval" / "step_000000.json"
    document = json.loads(first.read_text())
    document["sets"]["paper/nq"]["n"] = 50
    first.write_text(json.dumps(document))
    text = words_of(tmp_path)
    assert (
        "paper/nq 20.0 12.6 to 54.8 45.0 12.6 to 54.8 30.0 30.0 30.0 30.0 30 50, then 100 " in text
    )
    assert "average 21.0 12.6 to 54.8 46.0 12.6 to 54.8 +25.0 30.0 30.0 30.0 30.0 30 100 " in text
    first.unlink()
    assert "paper/nq 45.0 12.6 to 54.8 30.0 30.0 30.0 30.0 30 100 " in words_of(tmp_path)


def test_a_workdir_that_was_only_evaluated_has_a_page(tmp_path):
    (run_folder(tmp_path) / "metrics.jsonl").unlink()
    assert "0 steps" in (text := words_of(tmp_path)) and "paper/nq 20.0 12.6 to 54.8 45.0" in text
    assert list(charts_of(tmp_path)) == ["Right answers to held-out questions by policy, %"]


def test_names_are_no_formulas_and_null_is_no_number(tmp_path):
    found = report.read_evaluations(run_folder(tmp_path))
    for document in found:
        document["sets"] = {"$_{$ a": document["sets"]["paper/nq"]}
    assert ">$_{$ a<" in _svg(drawing.draw_evaluations(found))
    steps = report.Steps()
    steps.add({"funnel/proposed": 4.0, "funnel/verified": None, "funnel/well_formed": 2.0}, 1, 1.0)
    drawn = {chart.title: drawing.draw(chart, steps.curves) for chart in drawing.CHARTS}
    svg = _svg(drawn["Funnel, % of the questions asked"])
    assert ">well-formed<" in svg and ">verified<" not in svg


def test_spoilt_lines_are_passed_over_and_counted(tmp_path):
    """As a machine that went down leaves them."""
    run_folder(tmp_path, games=[(2, [game(), game()])])
    for name in ("metrics.jsonl", "episodes/step_000002.jsonl"):
        path = tmp_path / name
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(
            lines[0] + b"\0" * 20 + b"\n\n" + lines[0].strip() + lines[1] + b"".join(lines[1:])
        )
    assert report.read_metrics(tmp_path).spoilt == report.read_games(tmp_path, 9).spoilt == 3
    text = words_of(tmp_path)
    assert "6 spoilt lines of metrics.jsonl and episodes/ are passed over" in text
    assert "3 steps, 3.0 minutes" in text and "2 of the 2 games" in text


def test_what_is_not_text_is_shown_as_an_escape(tmp_path):
    """Half an emoji, which no file takes, and characters that turn the direction of writing."""
    run_folder(tmp_path, games=[(1, [game(question="Q \ud83d \u202e \x1b[31m")])])
    for path in (tmp_path / "eval").iterdir():
        path.write_text(path.read_text().replace("paper/nq", "a\\u202e\\u0001\\ud83d"))
    assert command.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert r"Q \ud83d \u202e \x1b[31m" in text and r"a\u202e\x01\ud83d" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)


def test_a_long_run_has_a_page_of_bounded_size(tmp_path):
    """And one that says what its points are."""
    names = ["reward/solver", "reward/proposer", "fault/empty", "update/solver/kl", "play/seconds"]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 6_001):
            values = {name: (step % 100) / 100 for name in names}
            file.write(json.dumps({"step": step, "time": 0.0, "seconds": 1.0} | values) + "\n")
    (tmp_path / "eval").mkdir()
    row = {name: 30.0 for name in (*SHARES, *MEANS)} | {
        "right": 20.0,
        "right_low": 10.0,
        "right_high": 30.0,
        "n": 9,
    }
    for step in range(0, 1025, 5):
        document = {"step": step, "judge": "em", "sets": {"nq": row}}
        (tmp_path / "eval" / f"step_{step:06d}.json").write_text(json.dumps(document))
    page = report.page(tmp_path, 9)
    assert len(page) < 600_000 and "6000 steps, 100.0 minutes" in page
    assert (
        "A point is the mean of 8 steps, the band their range." in page
        and "Mean of 8 steps." in page
    )
    assert "200 of 205 evaluations." in page
    line = report.read_metrics(tmp_path).curves.line("Rewards: solver")
    assert len(line) == 750 and {min(p.low for p in line), max(p.high for p in line)} == {0.0, 0.99}


@pytest.mark.parametrize("number", [0, 1, 7, 8, 9, 1000])
def test_a_curve_holds_all_values_in_few_points(number):
    curves = Curves(points=4)
    values = [float((7 * i) % 11) for i in range(number)]
    for i, value in enumerate(values):
        curves.add(i, {"x": value} | ({"late": 1.0} if i == number - 1 else {}))
    line = curves.line("x")
    assert len(line) <= 8 and curves.each * (len(line) - 1) < max(number, 1) <= curves.each * max(
        len(line), 1
    )
    assert sum(point.rows for point in line) == number
    assert sum(point.rows * point.mean for point in line) == pytest.approx(sum(values))
    for i, point in enumerate(line):
        own = values[i * curves.each : (i + 1) * curves.each]
        assert (point.low, point.high, point.mean) == (
            min(own),
            max(own),
            pytest.approx(sum(own) / len(own)),
        )
        assert point.step == i * curves.each + (len(own) - 1) / 2
    assert [point.rows for point in curves.line("late")] == ([1] if number else [])
    assert curves.names == (["x", "late"] if number else []) and curves.line("none") == []


def test_evaluations_of_other_inputs_are_not_compared(tmp_path):
    """After the index was built anew: no gain, and a curve of its own."""
    run_folder(tmp_path)
    last = tmp_path / "eval" / "step_000003.json"
    last.write_text(json.dumps(json.loads(last.read_text()) | {"inputs": {"the search": "other"}}))
    titles = list(charts_of(tmp_path))
    assert titles[:2] == [
        "Right answers to held-out questions by policy, %",
        "Right answers to held-out questions by policy with earlier inputs, %",
    ]
    assert "paper/nq 45.0 12.6 to 54.8 30.0" in words_of(tmp_path)


def test_a_gain_needs_the_same_questions_and_not_only_as_many(tmp_path):
    run_folder(tmp_path)
    for path, questions in zip(sorted((tmp_path / "eval").iterdir()), ("one", "two"), strict=True):
        document = json.loads(path.read_text()) | {
            "questions": {"paper/nq": questions, "average": "same"}
        }
        path.write_text(json.dumps(document))
    text = words_of(tmp_path)
    assert (
        "paper/nq 20.0 12.6 to 54.8 45.0 12.6 to 54.8 30.0 30.0 30.0 30.0 30 100, then others, 100"
        in text
    )
    assert "average 21.0 12.6 to 54.8 46.0 12.6 to 54.8 +25.0" in text


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step has ended yet." in report.page(tmp_path, 5)


def test_a_fault_whose_causes_are_known_is_drawn_by_these():
    curves = Curves()
    for step in range(3):
        found = {"fault/no_question": 2.0, "cause/no_question/loop": 2.0, "fault/empty": 1.0}
        curves.add(step, found | {"cause/no_question/turns": 0.0})
    image = drawing.draw_faults(curves).removeprefix("data:image/svg+xml;base64,")
    words = set(re.findall(r">([^<>]+)</text>", base64.b64decode(image).decode()))
    assert {"no question: loop", "empty"} <= words
    assert not {"no question", "no question: turns"} & words


# --- what helps to read ---------------------------------------------------------------------------


def test_a_reused_question_keeps_the_reason_of_the_one_that_failed(tmp_path):
    records = [game("When?", fault="unverified", reused=True), game()]
    text = report.page(run_folder(tmp_path, games=[(2, records)]), 9)
    assert 'data-outcome="reused unverified"' in text
    assert '<option value="unverified">' in text


def test_a_verifier_shows_what_it_was_given_to_read(tmp_path):
    own = {"id": "1", "title": '"Paris"', "text": "A city of light."}
    noise = {"id": "2", "title": '"Mud"', "text": "Wet earth."}
    record = game() | {"documents": [own], "noise": [noise]}
    page = Page(report.page(run_folder(tmp_path, games=[(2, [record])]), 9))
    text = " ".join(" ".join(page.words).split())
    assert "to read, the proposer's documents: Paris" in text and "A city of light." in text
    assert "to read, noise: Mud" in text and "Wet earth." in text


def test_one_begins_with_the_hardest_that_was_solved_and_the_newest():
    games = [
        report.shown_game(1, game(scores=(1.0, 1.0))),
        report.shown_game(1, game(scores=(0.0, 1.0))),
        report.shown_game(2, game(scores=(0.0, 0.0))),
        report.shown_game(3, game("Why?", fault="too_short")),
    ]
    found = report.first_to_read(games)
    assert found == {
        "the hardest question that was solved": 1,
        "the newest that was verified": 2,
    }
    assert report.first_to_read([]) == {}


def answered(folder, step, answers, judge="em"):
    """The episodes of an evaluation: by question, what was answered."""
    at = folder / "eval" / f"step_{step:06d}"
    at.mkdir(parents=True)
    lines = []
    for row, (question, (gold, answer)) in enumerate(answers.items()):
        record = episode(("solver", f"<answer> {answer} </answer>"))
        record |= {"set": "nq", "row": row, "question": question, "answers": [gold]}
        lines.append(json.dumps(record | {"answer": answer}) + "\n")
    (at / "episodes.jsonl").write_text("".join(lines))
    right = 100 * sum(gold == answer for gold, answer in answers.values()) / len(answers)
    row = dict.fromkeys((*SHARES, *MEANS, "right_low", "right_high"), 30.0)
    document = {"step": step, "judge": judge, "sets": {"nq": row | {"right": right, "n": 3}}}
    (folder / "eval" / f"step_{step:06d}.json").write_text(json.dumps(document))


BEFORE = {"One?": ("a", "a"), "Two?": ("b", "x"), "Three?": ("c", "y")}
AFTER = {"One?": ("a", "z"), "Two?": ("b", "b"), "Three?": ("c", "c")}


def test_held_out_questions_that_training_has_changed_are_shown(tmp_path):
    answered(tmp_path, 0, BEFORE)
    answered(tmp_path, 3, AFTER)
    text = " ".join(" ".join(Page(report.page(tmp_path, 0)).words).split())
    assert "2 became right" in text and "1 became wrong" in text
    assert "Two? → b x → b" in text and "One? → a a → z" in text
    before, after = (held_out.read(tmp_path, step, "em") for step in (0, 3))
    after["nq", 0].record["answers"].append("y")  # another alias: no longer the same question
    assert not held_out.changes(before, after)[1]


def test_a_judge_says_what_is_right_where_it_has_judged(tmp_path):
    answered(tmp_path, 3, AFTER, judge="policy")
    assert [a.right for a in held_out.read(tmp_path, 3, "policy").values()] == [False, True, True]
    verdict = {"set": "nq", "row": 0, "answer": "z", "judge": "policy", "right": True}
    other = verdict | {"judge": "another", "right": False}
    lines = "".join(json.dumps(line) + "\n" for line in (verdict, other))
    (tmp_path / "eval" / "step_000003" / "verdicts.jsonl").write_text(lines)
    assert all(a.right for a in held_out.read(tmp_path, 3, "policy").values())


def test_a_function_of_the_users_may_call_an_exact_match_wrong(tmp_path):
    answered(tmp_path, 3, AFTER, judge="own.py:right")
    verdict = {"set": "nq", "row": 1, "answer": "b", "judge": "own.py:right", "right": False}
    path = tmp_path / "eval" / "step_000003" / "verdicts.jsonl"
    path.write_text(json.dumps(verdict) + "\n")
    found = held_out.read(tmp_path, 3, "own.py:right").values()
    assert [a.right for a in found] == [False, False, True]


def test_runs_are_compared_question_by_question(tmp_path, capsys):
    for name, answers in (("first", BEFORE), ("second", AFTER)):
        (tmp_path / name).mkdir()
        run_folder(tmp_path / name)
        for path in (tmp_path / name / "eval").iterdir():
            path.unlink()
        answered(tmp_path / name, 3, answers)
    first, second = (compare.read(tmp_path / name) for name in ("first", "second"))
    gain = compare.against(first, second)
    assert (round(gain.before, 1), round(gain.after, 1)) == (33.3, 66.7)
    # One of three became wrong, two right: the differences are -1, 1, 1.
    assert gain.gain == pytest.approx(100 / 3) and (gain.low, gain.high) == (-100.0, 100.0)

    out = tmp_path / "both.html"
    words = [str(tmp_path / "first"), str(tmp_path / "second"), f"--out={out}"]
    assert command.main(words) == 0 and "both.html" in capsys.readouterr().out
    page = Page(out.read_text())
    text = " ".join(" ".join(page.words).split())
    assert "second 3 3.0 66.7 30.0 30.0 +33.3 -100.0 to +100.0" in text
    assert any(">first<" in _svg(source) for source in page.sources)


@pytest.mark.parametrize(("question", "gold"), [("Other?", "a"), ("One?", "an alias")])
def test_runs_without_a_question_and_its_golds_in_common_have_no_difference(
    tmp_path, question, gold
):
    answered(tmp_path / "first", 3, {"One?": ("a", "a")})
    answered(tmp_path / "second", 3, {question: (gold, "a")})
    first, second = (compare.read(tmp_path / name) for name in ("first", "second"))
    assert compare.against(first, second) is None
