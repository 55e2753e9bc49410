"""The defects of the older programs that this one must not have, each with the tests that keep it out."""

import ast

from tests.support.source_files import TESTS, nodes_of

# what went wrong -> how the tests begin that keep it out
TRAPS = {
    "1 ORPO scored tokens two ahead and counted the prompt": ("test_orpo_by_hand", "test_packed_pairs"),
    "2 reference sums were compared with policy means": ("test_prepared_scores_are_those",),
    "3 references were computed before truncation": ("test_truncation_drops_the_reference",),
    "3 prompts were cut at the wrong end": ("test_caps_keep_the_cue_and_are_counted",),
    "4 log-probabilities were summed in bf16": ("test_long_answers_are_summed_in_float32",),
    "5 the end token was never trained": ("test_token_zero_is_trained",),
    "6 L2Wrap was not scaled with the loss": ("test_accumulated_sft_equals_one_batch",),
    "7 accumulation stretched the schedule": ("test_accumulation_does_not_stretch_the_schedule",),
    "8 the logged rate was not the one used": ("test_the_logged_rate_is_the_one_used",),
    "9 softplus instead of the likelihood": ("test_sft_by_hand", "test_sft_formula"),
    "10 a resumed PiSSA subtracted two beginnings": ("test_a_stopped_run_goes_on_and_merges_as",),
    "11 one scaling for all layers at a merge": ("test_each_matrix_gets_its_own_scaling",),
    "12 int8 with one largest value for a matrix": ("test_int8_is_bitsandbytes_format",),
    "13 missing keys were hidden": ("test_missing_unexpected_and_misshapen_tensors",),
    "14 an epoch drew with replacement": ("test_every_example_once_a_pass",),
    "14 every rank drew the same": ("test_ranks_share_a_step_without_overlap",),
    "15 a state kernel read out of bounds": ("test_kernel_values_and_gradients_equal_the_plain",),
    "16 tail tokens were not written": ("test_every_output_element_is_written",),
    "17 the state's layout depended on the backend": ("test_a_state_means_the_same_to_every_backend",),
    "18 infinite context lost gradients": ("test_packed_documents_in_chunks_equal_one_pass",),
    "19 a folder's name made it upload": ("test_nobody_is_called",),
    "20 sets lost the pairing": ("test_pairs_stay_together_whatever_the_hash_seed",),
    "21 sampling never stopped at the end token": ("test_end_of_document_ends_without_being_said",),
    "22 nothing was saved": ("test_a_run_without_a_word_about_saving_saves",),
    "23 an embedding's row was not loaded": ("test_an_embedding_that_trained_is_loaded",),
}


def test_every_trap_has_its_test():
    """If this breaks, a test that kept an old defect out was renamed or removed."""
    there = [
        node.name
        for path in TESTS
        for node in nodes_of(path)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    gone = [
        (trap, name) for trap, names in TRAPS.items() for name in names if not any(n.startswith(name) for n in there)
    ]
    assert not gone
