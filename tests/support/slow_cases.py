"""Slow cases of quick tests; a quicker case of the same test keeps the promise in ``make test``.

``make test-all`` runs all of them. Patterns are searched in the ids of tests.
"""

SLOW_CASES = (
    r"test_assignment\.py::test_known_models.*-(512|1024)\]",
    r"test_benchmarks\.py::test_(autoencoder|ablation|asynchronous|training_step_takes_small)",
    r"test_checkpoint_layouts\.py::test_.*\[\w+-3\]",
    r"test_checkpoint_resume\.py::test_a_run_resumed.*\[(EvaF|EvaS|KLShampoo|KFAC)\]",
    r"test_conditions\.py::test_every_rank.*\[4\]",
    r"test_eva_collectives\.py::test_a_step.*\[(fsdp 3|fsdp x tp)\]",
    r"test_eva_experts\.py::test_iterates.*\[fsdp 3\]",
    r"test_eva_layouts\.py::test_iterates.*\[fsdp 3\]",
    r"test_failures\.py::test_gradients_of_few.*-(newton_schulz|qr)\]",
    r"test_kfac_layouts\.py::test_iterates.*\[(fsdp 3|fsdp 4|fsdp, summing|fsdp over columns)\]",
    r"test_kl_reference\.py::test_iterates.*\[(decay|nesterov|beta3|not merged)",
    r"test_kl_reference\.py::test_iterates.*\[grafting (adagrad|rmsprop|sgd)",
    r"test_linear_work\.py::test_twice_the_parameters_are_twice_the_work_on_two_ranks\[KFAC\]",
    r"test_soap_reference\.py::test_iterates.*\[(decay|nesterov|not merged|no first).*-eigh\]",
    r"test_statistics_layouts\.py::test_tensor_parallel\[sequence-compiled\]",
    r"test_statistics_wrappers\.py::test_every_row.*\[compile-(selective|checkpoint)\]",
    r"test_titan_eva\.py::test_every_method_lowers.*\[(FOOF|EvaF)\]",
    r"test_titan_eva\.py::test_a_checkpoint_of_two.*\[(EvaF|EvaS|FOOF)\]",
    r"test_titan_images\.py::test_other_formats.*changes1",
    r"test_titan_images\.py::test_two_ranks_train",
    r"test_titan_plan\.py::test_plan_of_llama_8b",
)
