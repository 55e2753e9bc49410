"""Where the host may wait for a GPU, and why: `file:function`, below src/rwkv_rlhf/.

tests/runs/test_pretend_gpu.py runs the program on a pretend GPU and knows no other place.
"""

# between the ends of two optimizer steps: reading a batch, forward, backward, the update, the log
IN_A_STEP = {
    "transfers.py:Fetched.tolist": "once: the metrics, the losses and the gradient's norm, sent when backward was "
    "queued and read when the update is",
}
IN_A_TOKEN = {
    "generation/sampler.py:_Run._sample": "once: the sampled tokens decide which sequences go on; once more where "
    "the likeliest tokens that were sorted do not reach top_p",
}
IN_A_ROLLOUT = {
    "data/policy_batch.py:per_answer": "once a micro-batch and number (log-probabilities, values): samples wait on the "
    "host, and resume points hold them",
}
BESIDE = {
    "layers/linear.py:StorageSpec.dense": "a model is loaded",
    "layers/linear.py:Matrix.load_weight": "a model is loaded",
    "layers/adapters/adapter.py:Adapter.load_weight": "a model is loaded",
    "layers/adapters/pissa.py:principal_factors": "a model is loaded: the probe is drawn on the host",
    "layers/adapters/pissa.py:PrincipalFactors.load_weight": "a model is loaded",
    "layers/adapters/pissa.py:PrincipalFactors._factors": "a model is loaded: a matrix of zeros begins as LoRA does",
    "layers/stores/nf4.py:FourBit.pack": "a model is loaded: bitsandbytes has its table of levels on the host",
    "checkpoints/loading.py:copy_into": "a model is loaded",
    "training/strategies/__init__.py:load_rank_state": "a run is resumed",
    "training/resume.py:HostCopy.__call__": "a resume point: the tensors must not change before they are copied",
    "training/fit.py:fit": "Lightning begins and ends: the model goes back to the host",
    "layers/stores/store.py:ExactBuffers._apply": "Lightning ends: the model goes back to the host",
    "checkpoints/run_folder.py:trained_tensors": "a checkpoint is written",
    "checkpoints/adapter_files.py:initial_factors": "the initial factors are written",
    "checkpoints/tensor_files.py:write_tensors": "the batch of a step that is left out is written",
    "checkpoints/merging.py:Merged.__getitem__": "a merged matrix is written",
    "scoring/finite.py:broken_tensor": "before the first rollout",
    "scoring/evaluation.py:_text_score": "held out: once a row of 8192 tokens",
    "scoring/evaluation.py:score_pairs.scored_row": "held out: once a row of 8192 tokens",
    "scoring/divergence.py:Divergence.__init__": "held out: the reference's distributions wait on the host",
    "scoring/divergence.py:Divergence.of": "held out: once",
}
