"""A process that is killed when anything in it asks for a way out of the machine: `python sealed.py FOLDER`.

Two watches. Python's audit hook sees each socket that Python code opens, each address it looks up and each connection
it makes, and prints the stack. A filter in the kernel (seccomp) sees the system call itself, so libraries in C and Rust
are watched too; it lets sockets between processes of this machine through (AF_UNIX) and ends the process at any other.
"""
import ctypes
import faulthandler
import os
import signal
import socket
import struct
import sys
import time
import traceback

LEFT = 97  # exit code of a process in which Python asked for a way out
ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # the kernel's name for each; `socket` there
LOAD, EQUALS, RETURN, ALLOW, TRAP = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00030000
FIELDS = {"call": 0, "architecture": 4, "first argument": 16}  # of struct seccomp_data


def watch(event, args):
    "End the process, with the stack, where Python code opens a socket that is not AF_UNIX, or looks a name up."
    if not event.startswith("socket."): return
    looks_up = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
    family = args[1] if event == "socket.__new__" else getattr(args[0], "family", socket.AF_UNIX) if args else None
    if not looks_up and family in (None, socket.AF_UNIX, -1): return
    print(f"LEFT THE MACHINE: {event}{args}", file=sys.stderr)
    traceback.print_stack()
    sys.stderr.flush()
    os._exit(LEFT)


def filter_calls():
    "In the kernel: the call `socket` for any family but AF_UNIX ends the process. False where that cannot be had."
    known = ARCHITECTURES.get(os.uname().machine)
    if sys.platform != "linux" or known is None: return False
    architecture, call = known
    steps = [(LOAD, 0, 0, FIELDS["architecture"]), (EQUALS, 0, 5, architecture), (LOAD, 0, 0, FIELDS["call"]),
             (EQUALS, 0, 3, call), (LOAD, 0, 0, FIELDS["first argument"]), (EQUALS, 1, 0, socket.AF_UNIX),
             (RETURN, 0, 0, TRAP), (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    faulthandler.register(signal.SIGSYS, chain=True)  # the stack of whoever asked
    return prctl(38, 1, None, 0, 0) == 0 and prctl(22, 2, ctypes.addressof(program), 0, 0) == 0


def seal():
    sys.addaudithook(watch)
    return filter_calls()


def rows():
    "Examples to learn from, as JSONL."
    import json
    texts = ("read the file", "sort the list", "close a socket", "count the words")
    return "".join(json.dumps({"prompt": f"{t} {i}", "completion": t, "group": str(i)}) + "\n"
                   for i in range(40) for t in texts)


def commands(root):
    "Each command of the lab, in the order in which a user comes to them, with its options."
    data, base, run, merged = (f"{root}/{name}" for name in ("rows.jsonl", "base", "run", "merged"))
    small = "--steps 2 --batch-size 2 --accumulation 1 --rank 2 --eval-examples 4 --eval-prompts 1 --device cpu"
    yield "doctor", []
    yield "data", [data, "--model", base]
    yield "plan", [base]
    yield "train", ["--data", data, "--model", base, "--out", run, *small.split()]
    yield "chat", [run, "--prompt", "sort the list", "--max-new-tokens", "4", "--device", "cpu"]
    yield "merge", [run, "--out", merged, "--device", "cpu"]
    out = merged if os.path.exists(merged) else run
    yield "export", [out, "--gguf", "F16", "--out", f"{root}/gguf"]
    yield "model-card", [out, "--force"]
    yield "verify", [out]
    with open(f"{root}/grid.toml", "w") as file:
        file.write(f'model = "{base}"\ndata = "{data}"\nlr = [1e-3, 2e-3]\nsteps = 2\nwarmup = 0\nbatch_size = 2\n'
                   "accumulation = 1\nrank = 2\neval_examples = 4\n")
    yield "sweep", [f"{root}/grid.toml", "--folder", f"{root}/swept", "--device", "cpu"]
    yield "compare", [f"{root}/swept"]


def main(root):
    "All commands that there are; the exit code."
    from qlora_lab import cli, load_model
    from qlora_lab.assets import SMOLLM2
    from qlora_lab.manifest import MANIFEST, record_run
    codes = {}
    for name, words in commands(root):
        if name not in cli.COMMANDS: continue
        if name == "model-card" and not os.path.exists(f"{words[0]}/{MANIFEST}"): record_run(words[0])
        start = time.perf_counter()
        codes[name] = cli.main([name, *words])
        print(f"== {name}: {codes[name]}, {time.perf_counter() - start:.1f} s", flush=True)
    load_model(SMOLLM2, quantize=None, device="cpu")
    bad = {name: code for name, code in codes.items() if code > (name == "doctor")}
    unknown = cli.COMMANDS.keys() - codes
    print(f"bad {bad}, without a line in `commands` {unknown}", flush=True)
    return 1 if bad or unknown else 0


if __name__ == "__main__":
    print("filtered" if seal() else "not filtered", flush=True)
    if sys.argv[1] == "python": socket.create_connection(("127.0.0.1", 9))
    elif sys.argv[1] == "native": ctypes.CDLL(None).socket(socket.AF_INET, socket.SOCK_STREAM, 0)
    elif sys.argv[1] == "local": socket.socketpair()
    else: sys.exit(main(sys.argv[1]))
