"""Scores say under what conditions they were made."""

from ssp_jax.config.command_line import parse_command_line
from ssp_jax.evaluation import conditions


def of(name: str, *overrides: str) -> dict[str, object]:
    words = [f"--config=configs/{name}.py", *(f"--config.{key}" for key in overrides)]
    return conditions.of(parse_command_line(words).config, 1_000, "corpus 1a2b", "{{ messages }}")


def test_the_retriever_and_the_judge_are_named_with_their_models() -> None:
    found = of("paper_7b")
    assert found["encoder"] == "intfloat/e5-base-v2"
    assert found["judge_model"] == "Qwen/Qwen2.5-32B-Instruct"
    said = conditions.beside_the_paper(found)
    assert "dense (intfloat/e5-base-v2) of 1,000 passages, 3 a search" in said
    assert "judged by openai (Qwen/Qwen2.5-32B-Instruct); the paper" in said

    own = of("qwen7b", "eval.judge=policy")
    assert own["judge_model"] == "Qwen/Qwen2.5-7B-Instruct" and "encoder" not in own
    assert "judge_model" not in of("qwen7b")
    assert found["judge.max_tokens"] > 0 and "judge.max_tokens" not in of("qwen7b")


def test_a_server_stands_where_the_number_of_passages_is_not_known() -> None:
    address = "http://127.0.0.1:8000/retrieve"
    found = of("qwen7b", "retriever.kind=http", f"retriever.url={address}")
    assert "passages" not in found
    secret = of("qwen7b", "retriever.kind=http", f"retriever.url={address}?api_key=abc")
    assert "abc" not in str(secret["server"])
    assert f"http of {address}, 3 a search" in conditions.beside_the_paper(found)


def test_a_search_and_a_metric_of_the_users_stand_by_their_names() -> None:
    found = of("qwen7b", "retriever.kind=own.py:Search", "eval.judge=own.py:right")
    assert "passages" not in found
    said = conditions.beside_the_paper(found)
    assert said.startswith("these scores: own.py:Search, 3 a search, judged by own.py:right; ")


def test_limits_and_prompts_are_there() -> None:
    found = of("qwen7b", "limits.searches=4", "prompt.style=brief")
    assert (found["limits.searches"], found["prompt.style"]) == (4, "brief")
    assert found["temperature"] == 0.0


def test_the_corpus_and_the_chat_template_are_there_by_their_digests() -> None:
    found = of("qwen7b")
    assert found["searched"] == "corpus 1a2b" and found["prompt.template"] == "chat"
    config = parse_command_line(["--config=configs/qwen7b.py"]).config
    other = conditions.of(config, 1_000, "corpus 1a2b", "{{ turns }}")
    assert {key for key in found if found[key] != other[key]} == {"chat_template"}
    assert "chat_template" not in of("qwen7b", "prompt.template=raw_chatml")
