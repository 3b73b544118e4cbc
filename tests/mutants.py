"""One-line breaks of the package, each with the test that must fail: are the tests awake?

    python -m tests.mutants [--only=WORD]        # about 20 minutes; writes tests/mutants.txt

With --only the rows of the other mutants stay as they are. Each mutant is played in a copy of the
repository. `make test` checks that each line that is broken here is still there
(tests/test_mutants.py).
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "tests" / "mutants.txt"
SECONDS = 600  # a mutant may hang: that is a failure of its test too
COPIED = ("ssp_jax", "configs", "tests", "assets", "benchmarks", "launch", "pyproject.toml")


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str  # in ssp_jax/
    line: str  # occurs once in the file
    broken: str
    test: str  # in tests/: a node id, which must fail

    @property
    def what(self) -> str:
        return f"{self.file}: {self.broken.strip()} | {self.test}"


MUTANTS = [
    Mutant(
        "learner/objective.py",
        "if n == 1:",
        "if n == 0:",
        "learner/test_objective.py::test_group_of_one_keeps_its_reward",
    ),
    Mutant(
        "learner/objective.py",
        "centred -= centred.mean()",
        "centred -= centred.min()",
        "learner/test_objective.py::test_grpo_by_hand",
    ),
    Mutant(
        "learner/objective.py",
        "centred *= n / (n - 1)  #",
        "centred *= 1  #",
        "learner/test_objective.py::test_leave_one_out_is_reward_minus_mean_of_the_others",
    ),
    Mutant(
        "learner/objective.py",
        "return 1.0 / (np.maximum(num_tokens_E, 1) * episodes)",
        "return 1.0 / np.maximum(num_tokens_E, 1)",
        "learner/test_objective.py::test_sequence_weights_by_hand",
    ),
    Mutant(
        "learner/objective.py",
        "surrogate_BT = jnp.minimum(",
        "surrogate_BT = jnp.maximum(",
        "learner/test_objective.py::test_clipped_surrogate_by_hand",
    ),
    Mutant(
        "learner/objective.py",
        "jnp.where(advantage_BT < 0, dual_BT",
        "jnp.where(advantage_BT > 0, dual_BT",
        "learner/test_objective.py::test_dual_clip_by_hand",
    ),
    Mutant(
        "learner/objective.py",
        "k3 = jnp.exp(delta) - delta - 1",
        "k3 = jnp.exp(-delta) + delta - 1",
        "learner/test_objective.py::test_kl_estimates_by_hand",
    ),
    Mutant(
        "learner/objective.py",
        "is_token_BT = weight_BT != 0",
        "is_token_BT = weight_BT == weight_BT",
        "learner/test_objective.py::test_weight_zero_means_no_token_even_when_it_is_broken",
    ),
    Mutant(
        "learner/batches.py",
        "weight * np.asarray(episode.sampled[1:], np.float32)",
        "weight",
        "learner/test_update.py::test_gradient_reaches_sampled_tokens_only",
    ),
    Mutant(
        "game/rewards.py",
        "return 1.0 - scores_QG.mean(axis=1)",
        "return scores_QG.mean(axis=1)",
        "game/test_rewards.py::test_proposer_plus_mean_solver_is_one",
    ),
    Mutant(
        "game/rewards.py",
        "return score / 4 if tags",
        "return score if tags",
        "game/test_rewards.py::test_solver_reward",
    ),
    Mutant(
        "game/rewards.py",
        "(a|an|the)",
        "(a|an)",
        "game/test_rewards.py::test_normalize",
    ),
    Mutant(
        "game/rules.py",
        "return hidden in words.lower() or",
        "return hidden in words or",
        "game/test_rewards.py::test_question_fault",
    ),
    Mutant(
        "game/noise.py",
        "taken = set(own)",
        "taken = set()",
        "game/test_noise.py::test_own_documents_are_not_noise_and_others_take_their_place",
    ),
    Mutant(
        "game/roles.py",
        "self.sampled += [False] * len(tokens)",
        "self.sampled += [True] * len(tokens)",
        "game/test_roles.py::test_an_episode_of_two_turns",
    ),
    Mutant(
        "game/roles.py",
        "elif len(self.queries) >= self.context.limits.searches:",
        "elif len(self.queries) > self.context.limits.searches:",
        "game/test_roles.py::test_one_search_too_many_ends_it",
    ),
    Mutant(
        "game/selfplay.py",
        "played = [each for each in ended if each[1].num_sampled]",
        "played = ended",
        "game/test_selfplay.py::test_a_given_answer_without_room_in_the_prompt_is_an_outcome_of_the_game",
    ),
    Mutant(
        "game/roles.py",
        "self.documents += seen",
        "self.documents += result",
        "game/test_roles.py::test_the_documents_of_an_episode_are_as_long_as_they_were_shown",
    ),
    Mutant(
        "game/roles.py",
        "if self.context.tell_repeats and found in self._found:",
        "if self.context.tell_repeats:",
        "game/test_roles.py::test_a_result_that_was_shown_already_is_told_so_where_asked",
    ),
    Mutant(
        "game/selfplay.py",
        "game.noise = [seen for document in drawn for seen in self._context.seen([document])]",
        "game.noise = drawn",
        "game/test_selfplay.py::test_the_verifier_reads_no_more_of_a_document_than_players_do",
    ),
    Mutant(
        "game/selfplay.py",
        "_random(self._config.seed, 5, step, i)",
        "_random(self._config.seed, 5, 0, i)",
        "game/test_selfplay.py::test_the_players_of_a_game_are_shown_one_set_drawn_by_seed_step_and_game",
    ),
    Mutant(
        "game/selfplay.py",
        "list(dict.fromkeys(pool)) * section.pool_reuse",
        "list(pool) * section.pool_reuse",
        "game/test_selfplay.py::test_a_question_of_the_pool_fills_no_more_slots_than_allowed",
    ),
    Mutant(
        "game/causes.py",
        'return "loop" if _loops(episode) else reason',
        "return reason",
        "game/test_causes.py::test_why_a_proposer_wrote_no_question",
    ),
    Mutant(
        "game/examples.py",
        "name in words and name not in read",
        "name in words",
        "game/test_examples.py::test_a_leak_is_a_name_of_an_example_that_was_read_nowhere_else",
    ),
    Mutant(
        "game/metrics.py",
        "(share := metrics[name]) > _MUCH",
        "(share := metrics[name]) >= _MUCH",
        "game/test_selfplay.py::test_a_tenth_may_be_cut_without_a_word",
    ),
    Mutant(
        "rollout/sampling.py",
        "jnp.argmax(level_BU + noise_B[:, :U]",
        "jnp.argmax(level_BU + 0 * noise_B[:, :U]",
        "rollout/test_sampler.py::test_draw_follows_the_probabilities_in_and_across_blocks",
    ),
    Mutant(
        "rollout/sampling.py",
        "jax.random.fold_in(key, uid), position)",
        "jax.random.fold_in(key, 0), position)",
        "rollout/test_sampler.py::test_other_episode_id_other_tokens",
    ),
    Mutant(
        "rollout/stops.py",
        "next_A256[len(prefixes) + i] = len(prefixes) + i",
        "next_A256[len(prefixes) + i] = 0",
        "rollout/test_stops.py::test_found_stop_stays_whatever_follows",
    ),
    Mutant(
        "model/tokens.py",
        "return self._pattern.sub(self._new_mark, whole(value))",
        "return value",
        "model/test_tokens.py::test_text_never_becomes_a_control_token",
    ),
    Mutant(
        "model/linear.py",
        "return kernel.astype(jnp.float32) + scale * product",
        "return kernel.astype(jnp.float32) + product",
        "model/test_hf_adapter.py::test_logits_of_the_merged_export_equal_pefts",
    ),
    Mutant(
        "model/hf_adapter.py",
        "return is_target(module) and not is_excluded(module)",
        "return is_target(module)",
        "model/test_hf_adapter.py::test_keys_are_read_as_peft_reads_them",
    ),
    Mutant(
        "model/hf_adapter.py",
        "if key not in known and value not in _EMPTY:",
        "if False:",
        "model/test_hf_adapter.py::test_a_config_of_another_function_is_refused",
    ),
    Mutant(
        "model/hf_save.py",
        "if self.only_process in (None, device.process_index)",
        "if True",
        "model/test_hf_save.py::test_two_processes_read_their_own_bytes_and_write_their_own_files",
    ),
    Mutant(
        "model/attention.py",
        "scores = jnp.where(visible_BTS[:, None, None], scores * H**-0.5, NEG_INF)",
        "scores = scores * H**-0.5",
        "model/test_attention.py::test_parts_put_together_equal_attention_to_all_keys",
    ),
    Mutant(
        "data.py",
        "np.random.SeedSequence((seed, epoch))",
        "np.random.SeedSequence((seed, 0))",
        "test_data.py::test_order_depends_on_seed_and_epoch_only",
    ),
    Mutant(
        "evaluation/scores.py",
        "return self.after - self.before",
        "return self.before - self.after",
        "evaluation/test_scores.py::test_gains_are_paired",
    ),
    Mutant(
        "runtime/records.py",
        "            elif _skip_line(file):",
        "            elif not _skip_line(file):",
        "runtime/test_records.py::test_a_line_without_end_is_not_kept_in_memory",
    ),
    Mutant(
        "runtime/checkpoint.py",
        "for step in reversed(steps):",
        "for step in steps:",
        "runtime/test_checkpoint.py::test_a_damaged_step_is_set_aside_for_the_one_before",
    ),
    Mutant(
        "model/linear.py",
        "contract(1, self.lora_scale * low_rank, self.lora_b[...])",
        "contract(1, low_rank, self.lora_b[...])",
        "learner/test_lora.py::test_an_adapter_adds_its_product_to_the_kernel",
    ),
    Mutant(
        "model/linear.py",
        "self.lora_b = nnx.Param(jnp.zeros(",
        "self.lora_b = nnx.Param(jnp.ones(",
        "learner/test_lora.py::test_an_adapter_whose_b_is_zero_gives_the_bases_logprobs_bit_for_bit",
    ),
    Mutant(
        "model/decoder.py",
        "return split_trained(config, params)[1]",
        "return params",
        "learner/test_lora.py::test_an_update_trains_the_adapter_alone",
    ),
    Mutant(
        "learner/update.py",
        "return self._score_all(reference, frozen, batches)",
        "return [[batch.sampler_logp_BT for batch in mini_batch] for mini_batch in batches]",
        "learner/test_lora.py::test_the_reference_is_the_initial_model_whatever_is_trained",
    ),
    Mutant(
        "model/weights.py",
        "if new is not old:",
        "if False:",
        "model/test_weights.py::"
        "test_the_base_moves_between_learner_and_sampler_and_keeps_its_bytes",
    ),
    Mutant(
        "model/weights.py",
        "self._base.for_sampler(), self._adapter_to_sampler(trained))",
        "self._base.for_sampler(), self._adapter_to_sampler(self.initial()))",
        "test_lora_run.py::test_sampler_and_trainer_use_one_adapter",
    ),
    Mutant(
        "plan/hardware.py",
        "return (1 - RESERVE) * self.hbm",
        "return self.hbm",
        "plan/test_plan.py::test_a_twentieth_of_the_memory_is_left_free",
    ),
    Mutant(
        "plan/memory.py",
        "if longest_episode(target) <= room < size:",
        "if False:",
        "plan/test_plan.py::test_the_cache_gives_up_what_the_programs_need",
    ),
    Mutant(
        "plan/planner.py",
        "if after is None or after.excess >= present.excess:",
        "if after is None or chosen:",
        "plan/test_plan.py::test_a_change_is_made_as_often_as_it_helps",
    ),
    Mutant(
        "learner/flash.py",
        "return (first <= key) & (key <= query)",
        "return key <= query",
        "model/test_attention.py::test_flash_equals_packed_on_each_shard",
    ),
    Mutant(
        "learner/flash.py",
        "dk_ref[...] = (dk_TH * scale).astype(dk_ref.dtype)",
        "dk_ref[...] = dk_TH.astype(dk_ref.dtype)",
        "model/test_attention.py::test_the_check_of_a_kernel_passes_one_that_is_right",
    ),
    Mutant(
        "model/attention.py",
        "if not difference < _TOLERANCE:",
        "if difference > _TOLERANCE:",
        "model/test_attention.py::test_the_check_of_a_kernel_refuses_one_that_is_wrong",
    ),
    Mutant(
        "model/decoder.py",
        "total.at[i].add(grad)",
        "total.at[i].set(grad)",
        "learner/test_update.py::test_a_later_gradient_is_added_to_the_total_bit_for_bit",
    ),
    Mutant(
        "model/decoder.py",
        "save_only_these_names(attention.KEPT, linear.KEPT)",
        "save_only_these_names(attention.KEPT)",
        "model/test_decoder.py::test_an_adapter_adds_little_to_what_dots_keeps",
    ),
    Mutant(
        "plan/roofline.py",
        "rows = min(bucket for bucket in buckets if bucket >= min(in_deepest, buckets[-1]))",
        "rows = buckets[-1]",
        "plan/test_plan.py::test_a_step_reads_the_rows_of_the_deepest_piece_that_are_in_use",
    ),
    Mutant(
        "plan/cycles.py",
        "total += _turns(program[condition], turns) * (of(condition) + of(body))",
        "total += of(condition) + of(body)",
        "plan/test_cycles.py::test_loops_count_as_often_as_they_turn_and_of_branches_the_longer",
    ),
    Mutant(
        "rollout/kv_cache.py",
        "fori_loop(0, writes_M.sum(), one, list(old))",
        "fori_loop(0, len(row_M), one, list(old))",
        "plan/test_cycles.py::"
        "test_on_tpu_a_chunk_is_written_in_a_tenth_of_the_time_that_its_steps_read",
    ),
    Mutant(
        "model/sharding.py",
        "return jax.lax.with_sharding_constraint"
        '(x_BTD, NamedSharding(mesh, P("data", None, columns)))',
        "return x_BTD",
        "model/test_sharding.py::test_a_look_up_sends_no_table",
    ),
    Mutant(
        "learner/update.py",
        "look_up = functools.partial(sharding.embed_rows, c.rows_sharding)",
        "look_up = decoder.embed",
        "learner/test_update.py::test_a_split_vocabulary_is_not_gathered",
    ),
    Mutant(
        "rollout/scheduler.py",
        "held = self._prefix_in.pop(slot, ())",
        "held = self._prefix_in.get(slot, ())",
        "rollout/test_scheduler.py::test_each_slot_holds_its_players_tokens",
    ),
    Mutant(
        "model/sharding.py",
        "tree = jax.tree.map(lambda x: x if x.ndim else np.asarray(x), tree)",
        "tree = jax.tree.map(lambda x: x, tree)",
        "runtime/test_processes.py::test_several_processes_save_a_state_that_no_update_has_seen",
    ),
    Mutant(
        "retriever/topk.py",
        "return jnp.where(is_row[None], scores, -jnp.inf)",
        "return scores",
        "retriever/test_topk.py::test_no_row_is_missed_where_all_scores_are_negative_or_equal",
    ),
    Mutant(
        "retriever/topk.py",
        "candidates = np.flatnonzero(own_scores >= threshold)",
        "candidates = np.argpartition(-own_scores, k - 1)[:k]",
        "retriever/test_topk.py::test_the_host_finds_what_a_sort_finds",
    ),
    Mutant(
        "retriever/vectors.py",
        "return min(counts)",
        "return max(counts)",
        "retriever/test_vectors.py::test_a_build_that_is_killed_anywhere_ends_as_the_unbroken_one",
    ),
    Mutant(
        "export/form.py",
        "if getattr(flags, name) is None:",
        "if True:",
        "export/test_form.py::test_flags_that_are_given_win",
    ),
    Mutant(
        "evaluation/best.py",
        "return max(sorted(scores),",
        "return min(sorted(scores),",
        "evaluation/test_best.py"
        "::test_the_best_step_has_the_highest_mean_over_the_sets_or_that_of_one",
    ),
    Mutant(
        "runtime/checkpoint.py",
        "best = [checkpoint.step == self.best",
        "best = [checkpoint.step == -1",
        "test_keeping.py::test_the_best_step_is_kept_beside_the_newest_also_where_no_save_was_due",
    ),
    Mutant(
        "lifecycle/keeping.py",
        "if best == now.step and best not in saved:",
        "if False:",
        "test_keeping.py::test_the_best_step_is_kept_beside_the_newest_also_where_no_save_was_due",
    ),
    Mutant(
        "workdir.py",
        "if change.step < step and not",
        "if change.step <= step and not",
        "test_workdir.py::test_weights_depend_on_the_keys_of_their_steps_alone",
    ),
    Mutant(
        "runtime/logger.py",
        'row["step"] == last and CHANGES not in row',
        'row["step"] == last',
        "runtime/test_logger.py"
        "::test_changes_of_keys_hold_from_a_step_and_are_said_anew_where_a_run_goes_on_from_it",
    ),
    Mutant(
        "game/rewards.py",
        "return metric not in JUDGES or not exact_match(answer, golds)",
        "return not exact_match(answer, golds)",
        "user_code/test_user_code.py::test_a_function_judges_every_answer_alone",
    ),
    Mutant(
        "user_code/metric.py",
        "if not isinstance(right, bool | np.bool_):",
        "if False:",
        "user_code/test_user_code.py::test_a_metric_that_cannot_judge_is_told_at_the_start",
    ),
    Mutant(
        "warm_start/lessons.py",
        "sampled += [is_own] * len(piece)",
        "sampled += [True] * len(piece)",
        "warm_start/test_rows.py::test_a_played_episode_becomes_the_tokens_of_self_play",
    ),
    Mutant(
        "warm_start/rows.py",
        "if _is_kept(score >= 1 or whole, SOLVER, selection):",
        "if _is_kept(True, SOLVER, selection):",
        "warm_start/test_rows.py::test_with_the_default_wrong_solvers_are_left_out",
    ),
    Mutant(
        "warm_start/script.py",
        "game.verifier_order = [documents[i].id for i in order]",
        "game.verifier_order = [document.id for document in game.noise]",
        "warm_start/test_script.py::test_a_verifier_reads_the_proposers_own_documents_and_noise",
    ),
    Mutant(
        "warm_start/scripting.py",
        "if about & named or answers & set(map(comparable, about)):",
        "if about & named:",
        "warm_start/test_script.py::test_no_game_is_about_what_a_question_set_touches",
    ),
    Mutant(
        "corpus/words.py",
        'return list(map("".join, itertools.pairwise(letters)))',
        "return list(letters)",
        "corpus/test_words.py::test_words_of_a_text",
    ),
    Mutant(
        "corpus/words.py",
        "words += _pairs(found[1])",
        "words.append(found[1])",
        "corpus/test_words.py::test_a_query_finds_what_stands_within_a_clause",
    ),
    Mutant(
        "corpus/text_files.py",
        "size + added > _LIMIT or",
        "False or",
        "corpus/test_text_files.py::test_passages_have_about_a_hundred_words_and_whole_sentences",
    ),
    Mutant(
        "corpus/passages.py",
        "return os.fsencode(name) + ",
        "return ",
        "corpus/test_text_files.py::test_a_change_of_a_folder_is_seen",
    ),
    Mutant(
        "answers/selection.py",
        "if held_out := {form, *map(comparable, aliases)}",
        "if held_out := {candidate.text, *aliases}",
        "answers/test_answers.py::"
        "test_answers_of_the_evaluation_are_left_out_as_exact_match_compares",
    ),
    Mutant(
        "retriever/index.py",
        "return named.items() <= settings.items()",
        "return named == settings",
        "test_own_data.py::test_an_index_of_an_earlier_version_is_kept_and_searched_as_before",
    ),
    Mutant(
        "plan/planner.py",
        "shrinks = self.target.hbm is not None and",
        "shrinks =",
        "plan/test_plan.py::test_a_cpu_has_room_for_all_its_slots",
    ),
    Mutant(
        "learner/objective.py",
        "loss=-jnp.where(is_own_BT, weight_BT * logp_BT, 0.0).sum(),",
        "loss=-jnp.where(is_own_BT, logp_BT, 0.0).sum(),",
        "learner/test_supervised.py::test_the_loss_is_the_mean_of_own_tokens_by_hand",
    ),
    Mutant(
        "evaluation/coverage.py",
        "if words[place : place + len(gold_words)] == gold_words:",
        "if words[place : place + 1] == gold_words[:1]:",
        "evaluation/test_coverage.py::test_a_gold_is_in_the_corpus_where_cover_exact_match_finds_it",
    ),
    Mutant(
        "evaluation/coverage.py",
        'known = before["sets"] if before["search"] == retriever.source else {}',
        'known = before["sets"]',
        "evaluation/test_coverage.py::test_a_run_measures_once_and_again_when_questions_or_search_change",
    ),
    Mutant(
        "evaluation/conditions.py",
        'found["server"] = masked(r.url)',
        'found["server"] = r.url',
        "evaluation/test_conditions.py::test_a_server_stands_where_the_number_of_passages_is_not_known",
    ),
    Mutant(
        "evaluation/conditions.py",
        'if "passages" in found:',
        "if not where:",
        "evaluation/test_conditions.py::test_a_search_and_a_metric_of_the_users_stand_by_their_names",
    ),
    Mutant(
        "report/held_out.py",
        "right = said if said is not None else",
        "right = bool(said) or",
        "report/test_report.py::test_a_function_of_the_users_may_call_an_exact_match_wrong",
    ),
    Mutant(
        "report/held_out.py",
        "became[new.right].append",
        "became[old.right].append",
        "report/test_report.py::test_held_out_questions_that_training_has_changed_are_shown",
    ),
    Mutant(
        "report/compare.py",
        "if before[key].compares_with(after[key])",
        "if before",
        "report/test_report.py::"
        "test_runs_without_a_question_and_its_golds_in_common_have_no_difference",
    ),
    Mutant(
        "report/page.py",
        "if won and 0 < int(won) < int(all_)",
        "if won",
        "report/test_report.py::test_one_begins_with_the_hardest_that_was_solved_and_the_newest",
    ),
    Mutant(
        "trackers.py",
        "            self._failed = True\n",
        "            pass\n",
        "test_trackers.py::test_a_tracker_that_fails_is_named_once_and_the_run_goes_on",
    ),
    Mutant(
        "generate/ask.py",
        "        if presses:\n",
        "        if len(presses) > 1:\n",
        "test_generate.py::test_ctrl_c_stops_what_checks_for_it_and_not_more",
    ),
    Mutant(
        "learner/update.py",
        "rate(jnp.maximum(updates - 1, 0))",
        "rate(updates)",
        "learner/test_update.py::test_mini_batches_take_one_optimizer_step_each",
    ),
    Mutant(
        "export/card.py",
        "TRAINING[mode]",
        'TRAINING["train"]',
        "export/test_card.py::test_a_card_says_by_what_the_weights_were_trained",
    ),
    Mutant(
        "runtime/processes.py",
        "if platform.pathways_will_be_used(environment):",
        "if False:",
        "test_pathways.py::test_one_process_drives_all_chips",
    ),
    Mutant(
        "runtime/device_memory.py",
        'if "MemoryStats is only supported" not in str(error):',
        "if False:",
        "test_pathways.py::test_memory_that_is_not_reported_is_unknown_and_other_errors_stay_errors",
    ),
    Mutant(
        "assembly/inputs.py",
        'if not gib and platform != "cpu" and free is None:',
        "if False:",
        "test_pathways.py::test_the_cache_takes_what_is_free_where_that_is_known",
    ),
    Mutant(
        "model/sharding.py",
        "return device.process_index, slice_index, task, device.id",
        "return device.process_index, 0, 0, device.id",
        "test_pathways.py::test_chips_of_a_host_follow_each_other_in_the_mesh",
    ),
    Mutant(
        "learner/objective.py",
        "positions_BT + 1 >= fewest",
        "positions_BT >= fewest",
        "learner/test_update.py::test_gaps_by_the_place_in_the_episode_by_hand",
    ),
    Mutant(
        "game/rules.py",
        "return hidden in words.lower() or cover_exact_match(words, aliases)",
        "return hidden in words.lower()",
        "game/test_selfplay.py::test_an_alias_is_right_for_verifier_and_solver_and_must_not_stand_in_the_question",
    ),
    Mutant(
        "data.py",
        "answers = (answer, *row.aliases())",
        "answers = (answer,)",
        "test_data.py::test_aliases_count_like_the_answer_that_is_given_or_golden",
    ),
    Mutant(
        "report/held_out.py",
        'for name in ("question", "answers"))',
        'for name in ("question",))',
        "report/test_report.py::test_runs_without_a_question_and_its_golds_in_common_have_no_difference",
    ),
    Mutant(
        "evaluation/scores.py",
        "new_E = 100 * after[name][column]",
        'new_E = 100 * after[name]["right"]',
        "evaluation/test_evaluate.py::test_tables",
    ),
    Mutant(
        "evaluation/conditions.py",
        "processes.digest(template)",
        "config.prompt.template",
        "evaluation/test_conditions.py::test_the_corpus_and_the_chat_template_are_there_by_their_digests",
    ),
    Mutant(
        "rollout/decode_triton.py",
        "jnp.where(position_1T < length,",
        "jnp.where(position_1T <= length,",
        "rollout/test_decode_kernel.py::test_it_computes_what_xla_does",
    ),
    Mutant(
        "rollout/decode_triton.py",
        "tiles = jax.lax.div(length + keys - 1, keys)",
        "tiles = jax.lax.div(length, keys) + 1",
        "rollout/test_decode_kernel.py::test_it_reads_only_blocks_that_hold_tokens_of_the_slot",
    ),
    Mutant(
        "rollout/decode_mosaic.py",
        "jax.lax.broadcasted_iota(jnp.int32, (1, 1, T), 2) < tokens",
        "jax.lax.broadcasted_iota(jnp.int32, (1, 1, T), 2) <= tokens",
        "rollout/test_decode_kernel.py::test_it_computes_what_xla_does",
    ),
    Mutant(
        "rollout/decode_mosaic.py",
        "pl.when(offset < tokens)",
        "pl.when(offset <= tokens)",
        "rollout/test_decode_kernel.py::test_it_reads_only_blocks_that_hold_tokens_of_the_slot",
    ),
    Mutant(
        "rollout/decode_mosaic.py",
        "jnp.where(is_last, 0, i + 1), 1 - buffer)",
        "jnp.where(is_last, 0, i + 1), buffer)",
        "rollout/test_decode_kernel.py::test_it_computes_what_xla_does",
    ),
    Mutant(
        "rollout/sampler.py",
        "before_B = jnp.where(running_B, before_B, 0)",
        "before_B = jnp.where(running_B, before_B - 1, 0)",
        "rollout/test_decode_kernel.py::"
        "test_a_chunk_samples_the_same_tokens_with_heads_and_slots_split_over_devices",
    ),
    Mutant(
        "assembly/sections.py",
        "cache_tokens=min(sizes.cache_tokens, solver_tokens)",
        "cache_tokens=solver_tokens",
        "assembly/test_sections.py::test_an_evaluation_has_slots_for_solvers",
    ),
    Mutant(
        "warm_start/links.py",
        "None if title_of(document).aspect else",
        "",
        "warm_start/test_script.py::test_a_thing_that_only_aspects_are_told_of_has_no_kind",
    ),
    Mutant(
        "warm_start/script.py",
        'unknown = f"the {between}"',
        "unknown = UNKNOWN",
        "warm_start/test_script.py::"
        "test_a_nested_question_names_no_unknown_and_its_solver_says_what_it_needs",
    ),
    Mutant(
        "warm_start/links.py",
        "belongs = not title.aspect and _BELONGING.search(statement)",
        "belongs = True",
        "warm_start/test_script.py::"
        "test_what_a_thing_belongs_to_is_asked_for_by_its_kind_also_where_an_adjective_tells",
    ),
    Mutant(
        "warm_start/links.py",
        "_MAX_CHANGED = 2",
        "_MAX_CHANGED = 3",
        "warm_start/test_script.py::"
        "test_what_a_thing_belongs_to_is_asked_for_by_its_kind_also_where_an_adjective_tells",
    ),
    Mutant(
        "warm_start/fields.py",
        "least = max(MIN_PASSAGES, counts[labels[0]] // 2)",
        "least = 1",
        "warm_start/test_fields.py::test_what_many_passages_write_before_a_colon_is_a_label",
    ),
]


def play(mutant: Mutant, copy: Path) -> tuple[str, float]:
    """What pytest says of the test once the line is broken, and its seconds."""
    path = copy / "ssp_jax" / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.line, mutant.broken))
    # One address as in a run of all tests; no cache of bytecode, which is found by time and size.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    # -m: also those that `make test` leaves out.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", ""]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, f"tests/{mutant.test}"],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        # 1: tests ran and one failed. Others mean that no test has judged it.
        verdict = {0: "SURVIVED", 1: "killed"}.get(done.returncode, f"pytest {done.returncode}")
    except subprocess.TimeoutExpired:
        verdict = "killed"
    finally:
        path.write_text(text)
    return verdict, time.monotonic() - start


def keep(rows: dict[Mutant, str]) -> None:
    """Writes these rows into the result, and of the other mutants those that it has."""
    before = RESULT.read_text().splitlines()[1:]
    for mutant in MUTANTS:
        found = [row for row in before if row.endswith(mutant.what)]
        rows.setdefault(mutant, found[0] if found else f"unknown   {mutant.what}")
    in_order = [rows[mutant] for mutant in MUTANTS]
    killed = sum(row.startswith("killed") for row in in_order)
    head = f"{killed} of {len(in_order)} mutants killed by the test that must fail"
    RESULT.write_text("\n".join([head, *in_order]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose file or test has this word")
    only = parser.parse_args().only
    chosen = [m for m in MUTANTS if only in m.file or only in m.test]
    rows: dict[Mutant, str] = {}
    with tempfile.TemporaryDirectory(prefix="ssp_jax_mutants_") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for number, mutant in enumerate(chosen, 1):
            verdict, seconds = play(mutant, copy)
            rows[mutant] = f"{verdict:9} {mutant.what}"
            print(f"{number}/{len(chosen)} {seconds:4.0f} s  {rows[mutant]}", flush=True)
    killed = sum(row.startswith("killed") for row in rows.values())
    print(f"{killed} of {len(rows)} mutants killed")
    all_killed = killed == len(rows)
    keep(rows)
    return 0 if all_killed else 1


if __name__ == "__main__":
    sys.exit(main())
