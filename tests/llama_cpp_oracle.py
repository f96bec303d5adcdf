"""Runs a real llama.cpp: writes a tiny GGUF file, makes contexts of it, and prints what they log.

Run by an interpreter that can import llama_cpp and gguf. Standard input is one JSON object: `path`
where the file is written, `architecture`, `keys` (without the architecture's name) and `contexts`
(options as kvcalc names them). Standard output is one line for each context: the sizes in MiB as it
logs them, in that order, and `refused` where it is not made.

Which tensors an architecture has is asked of the loader: it names the next one that is missing, or
the shape that it expects, and the file is written anew until it loads.
"""

import ctypes
import json
import os
import re
import sys

os.environ["GGML_NO_BACKTRACE"] = "1"

import gguf
import llama_cpp
import numpy as np

VOCABULARY = 32
MOST_TENSORS = 2000

TYPES = {
    name: int(getattr(gguf.GGMLQuantizationType, theirs))
    for name, theirs in {
        "fp32": "F32",
        "fp16": "F16",
        "bf16": "BF16",
        "q8_0": "Q8_0",
        "q5_1": "Q5_1",
        "q5_0": "Q5_0",
        "q4_1": "Q4_1",
        "q4_0": "Q4_0",
        "iq4_nl": "IQ4_NL",
    }.items()
}

LOG: list[str] = []
SHOWN: list[bool] = []
"""Not empty once sizes are to be printed as they are logged."""


@llama_cpp.llama_log_callback
def remember(_level, text, _data):
    """Keep what is logged, and print sizes."""
    LOG.append(text.decode(errors="replace"))
    if SHOWN and (size := re.search(r": size = +([\d.]+) MiB", LOG[-1])):
        say(f"{size[1]} ")


def say(text):
    """Print at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def said():
    """What was logged since it was last cleared."""
    return "".join(LOG)


def write(path, architecture, keys, tensors):
    """A GGUF file with these keys, and zeros in tensors of these shapes (the first axis first)."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    writer.add_uint32(f"{architecture}.vocab_size", VOCABULARY)
    for name, value in keys.items():
        key = f"{architecture}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape[::-1], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path, architecture, keys):
    """A model of that file, whose tensors are found on the way: first as if all blocks had those of
    the first, and where that is not so one by one.
    """
    for alike in (True, False):
        model = search(path, architecture, keys, alike=alike)
        if model:
            return model
    raise SystemExit(said())


def search(path, architecture, keys, *, alike):
    """The model, or None when the loader complains of something else than a tensor."""
    tensors = {"token_embd.weight": [keys["embedding_length"], VOCABULARY]}
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    for _ in range(MOST_TENSORS):
        write(path, architecture, keys, tensors)
        LOG.clear()
        model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if model:
            return model
        if missing := re.search(r"tensor '([^']+)' not found", said()):
            name = missing[1]
            first = re.sub(r"^blk[.]\d+[.]", "blk.0.", name)
            tensors[name] = tensors.get(first, [1])
            if alike and name.startswith("blk.1."):
                whole = {key[6:]: shape for key, shape in tensors.items() if key[:6] == "blk.0."}
                for block in range(1, keys["block_count"]):
                    tensors |= {f"blk.{block}.{key}": shape for key, shape in whole.items()}
        elif wrong := re.search(r"tensor '([^']+)' has wrong shape; expected +([\d, ]+)", said()):
            tensors[wrong[1]] = [int(axis) for axis in wrong[2].split(",") if axis.strip()]
        else:
            return None
    return None


def answer(model, options):
    """Make a context and print what it says of its caches, in one line.

    In a process of its own, and as soon as it is said: the caches are allocated before the graph is
    built, which may stumble over a tensor that the loader calls optional.
    """
    parameters = llama_cpp.llama_context_default_params()
    for name, value in options.items():
        if name in ("type_k", "type_v"):
            setattr(parameters, name, TYPES[value])
        elif name == "flash_attn":
            parameters.flash_attn_type = int(value)
        else:
            setattr(parameters, name, value)
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        say("\n")
        return
    LOG.clear()
    SHOWN.append(True)
    made = llama_cpp.llama_init_from_model(model, parameters)
    if not made:
        say("refused")
    os._exit(0)


def main():
    """Answer one question."""
    asked = json.load(sys.stdin)
    llama_cpp.llama_log_set(remember, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = load(asked["path"], asked["architecture"], asked["keys"])
    for options in asked["contexts"]:
        answer(model, options)


if __name__ == "__main__":
    main()
