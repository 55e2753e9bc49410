"""No call of this program runs what a file says, read from the source text."""

import ast
import itertools

from tests.support.source_files import OTHERS, SCRIPTS, SRC, TESTS, name_of, nodes_of

# calls that build objects from bytes by running what the bytes say; by the whole name or its last part
FORBIDDEN = {
    *("eval", "exec", "pickle.load", "pickle.loads", "Unpickler", "marshal.loads", "shelve.open", "yaml.load"),
    *("unsafe_load", "full_load", "joblib.load", "os.system", "os.popen", "torch.jit.load", "torch.package"),
    # these read pickles of their own: a run's own folder is read by our own code
    *("load_checkpoint", "load_from_checkpoint", "get_fp32_state_dict_from_zero_checkpoint"),
}


def calls(*groups):
    """(place, name, keywords) of every call in the files."""
    for path in itertools.chain(*groups):
        for node in nodes_of(path):
            if isinstance(node, ast.Call):
                said = {word.arg: word.value for word in node.keywords}
                yield f"{name_of(path)}:{node.lineno}", ast.unparse(node.func), said


def tensors_only(said):
    return "weights_only" in said and ast.unparse(said["weights_only"]) == "True"


def test_torch_load_reads_tensors_only():
    """If this breaks, a downloaded checkpoint can run a program; said in each call, whatever torch's default is."""
    found = [(place, said) for place, name, said in calls(SRC, SCRIPTS, OTHERS, TESTS) if name.endswith("torch.load")]
    unsafe = [place for place, said in found if not tensors_only(said)]
    assert found and not unsafe


def test_no_file_is_run():
    """If this breaks, a data file, vocabulary or checkpoint can run a program."""
    found = []
    for place, name, said in calls(SRC, SCRIPTS, OTHERS):
        if name in FORBIDDEN or name.split(".")[-1] in FORBIDDEN - {"eval"}:
            found.append(f"{place}: {name}")
        for flag in ("allow_pickle", "shell", "trust_remote_code"):
            if flag in said and ast.unparse(said[flag]) not in ("False", "None", "0"):
                found.append(f"{place}: {name} with {flag}")
        if name.endswith(".fit") and "ckpt_path" in said and not tensors_only(said):
            found.append(f"{place}: {name}")
    assert not found, "\n".join(found)


def test_the_paths_of_this_test_exist():
    """If this breaks, the rules above look at nothing."""
    assert {"train.py", "chat.py"} <= {name_of(path) for path in SCRIPTS} and len(SRC) > 100
