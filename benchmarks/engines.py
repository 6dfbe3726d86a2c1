"""Measures useful tokens per second of our engine and others, with the same prompts, output lengths and sampling.

Each peer runs in a separate process and, if needed, environment. The first round tries every setting of every peer; the
fastest setting of each competitor, ours included, also runs in the other rounds, interleaved. With --screen, a shorter
task (fewer prompts, a quarter of each answer) finds the fastest settings before the first round. The slowest peers run
in the first round only. Prints medians, in one table for full-precision weights and one for quantised weights. A ratio
compares our best setting with a peer in the same table, round by round: machines differ, and are shared.

    python benchmarks/engines.py                                # everything: several hours on 2 cores
    python benchmarks/engines.py --peers ours,openvino          # every setting of both, without int8
    python benchmarks/engines.py --peers ours,vllm --screen 128 --rounds 1
    python benchmarks/engines.py --model smollm --rounds 1 --rows 16
    python benchmarks/engines.py --model 4b                     # random weights in the 4B shape, at 1, 8 and 16 slots

`benchmarks/peers/install.sh NAME` installs a peer that is printed as missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gxr_batch.models.demo import ensure_demo_model
from gxr_batch.models.weights_hash import cache_home

SCRIPTS = Path(__file__).parent / "peers"
SYSTEM = (
    "You write teaching cases for radiology residents. Describe the findings in order, name the most likely "
    "diagnosis and two alternatives, and end with one question for the reader. Use plain language."
)
SHORTEST, LONGEST = 32, 256  # tokens of an answer
SCREEN_SHARE = 4  # with --screen, the settings are tried with answers of a quarter of the length
PEER_SECONDS = 3600
# For every peer, as in gxr-batch's command line: spinning threads slow down all others on the core.
ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}


@dataclass(frozen=True)
class Peer:
    """One line of a table: a script, its options, and its environment ("" = this one).

    Peers of one `family` are settings of the same competitor.
    """

    name: str
    script: str
    options: tuple[str, ...] = ()
    environment: str = ""
    family: str = ""
    once: bool = False  # too slow to run in every round
    quantised: bool = False

    def python(self) -> Path:
        """Return its interpreter: GXR_BATCH_PEER_<NAME>, or the one that install.sh made."""
        if not self.environment:
            return Path(sys.executable)
        named = os.environ.get(f"GXR_BATCH_PEER_{self.environment.upper().replace('-', '_')}")
        return Path(named) if named else cache_home() / "peers" / self.environment / "bin" / "python"

    def missing(self) -> str:
        """Return how to install it."""
        packages = (SCRIPTS / f"{self.environment}.txt").read_text().split()
        return f"missing: benchmarks/peers/install.sh {self.environment} (pip install {' '.join(packages)})"


def _ours(name: str, *options: str, family: str = "", quantised: bool = False) -> Peer:
    return Peer(f"ours-{name}", "ours.py", options, family=family, quantised=quantised)


def _batching(
    name: str, script: str, *options: str, environment: str = "", quantised: bool = False
) -> tuple[Peer, ...]:
    """Return an engine with each number of sequences and of batched tokens, with and without the prefix cache."""
    return tuple(
        Peer(
            "-".join([name, str(sequences), str(tokens), *(["prefix"] if prefix else [])]),
            script,
            ("--sequences", str(sequences), "--tokens", str(tokens), *(["--prefix"] if prefix else []), *options),
            environment or name,
            family=name,
            quantised=quantised,
        )
        for sequences in (32, 64, 128)
        for tokens in (256, 512, 2048)
        for prefix in (False, True)
    )


LIBRARY = ("--kernels", "library", "--slots", "32")
PEERS = (
    Peer("guide", "guide.py", once=True),
    Peer("pipeline16", "pipeline.py", once=True),
    Peer("static16", "static.py", ("--batch", "16"), once=True),
    Peer("static32", "static.py", ("--batch", "32"), once=True),
    Peer("continuous", "continuous.py", once=True),
    *_batching("vllm", "vllm_cpu.py"),
    *_batching("vllm-zentorch", "vllm_cpu.py"),
    Peer("vllm-no-top-p", "vllm_cpu.py", ("--prefix", "--no-top-p"), "vllm", once=True),
    *(
        Peer(
            f"llamacpp-{kind}-{rows}",
            "llamacpp.py",
            ("--parallel", str(rows), "--weights", kind),
            environment="llamacpp",
            family=f"llamacpp-{kind}",
            quantised=kind != "bf16",
        )
        for kind in ("q4", "q8", "bf16")
        for rows in (8, 16, 32, 64)
    ),
    *_batching("openvino", "openvino_genai_ir.py"),
    *_batching("openvino-int8", "openvino_genai_ir.py", "--int8", environment="openvino", quantised=True),
    *(_ours(str(slots), "--slots", str(slots), family="ours") for slots in (32, 64, 128, 256)),
    _ours("auto", "--slots", "auto", family="ours"),
    _ours("8", "--slots", "8"),
    _ours("16", "--slots", "16"),
    _ours("64-no-prefix", "--slots", "64", "--no-prefix"),
    _ours("32-library", *LIBRARY),
    _ours("32-library-fast", *LIBRARY, "--not-reproducible"),
    _ours("32-library-no-prefix", *LIBRARY, "--no-prefix"),
    _ours("32-library-float32", *LIBRARY, "--dtype", "float32"),
    _ours("1", "--slots", "1"),
    _ours("8-nf4", "--kernels", "library", "--slots", "8", "--nf4", quantised=True),
)
ONLY_NAMED = {"ours-1", "ours-8-nf4"}
PEERS_OF = {"4b": "ours-1,ours-8,ours-16,ours-8-nf4"}  # by default; other models run all except ONLY_NAMED
ROWS_OF = {"4b": 16}
ANSWERS_OF = {"4b": (16, 48)}


@dataclass
class Outcome:
    """The results of a peer's rounds; `problem`: why a round has no result."""

    results: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""

    @property
    def rates(self) -> list[float]:
        """Useful tokens per second of each round."""
        return [result["tokens"] / result["seconds"] for result in self.results]

    @property
    def rate(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates)

    def median(self, *keys: str) -> float:
        """Return the median over the rounds of one figure, e.g. median("shares", "decode")."""
        return statistics.median(_inside(result, keys) for result in self.results)


def times(ours: Outcome, theirs: Outcome) -> float:
    """Return how many times as fast ours is: the median over the rounds that both ran, as the machine may change."""
    return statistics.median(one / other for one, other in zip(ours.rates, theirs.rates, strict=False))


def _inside(result: Any, keys: tuple[str, ...]) -> float:
    for key in keys:
        result = result[key]
    return float(result)


# ---------------------------------------------------------------------- the task


def findings(rng: random.Random) -> dict[str, str]:
    """Return the cells of one made-up case."""
    sides, zones = ("right", "left"), ("upper lobe", "middle zone", "lower lobe", "costophrenic angle", "hilum")
    signs = (
        "a patchy consolidation with air bronchograms",
        "a small effusion with a concave upper margin",
        "a rounded nodule of {} mm with smooth borders",
        "linear atelectasis above the raised diaphragm",
        "fine reticular shadowing and thickened septal lines",
        "a cavity with an air-fluid level of {} mm",
    )
    sentences = [
        f"In the {rng.choice(sides)} {rng.choice(zones)} there is {rng.choice(signs).format(rng.randint(6, 40))}."
        for _ in range(rng.randint(1, 5))
    ]
    sentences.append(rng.choice(("The heart is of normal size.", "The heart is enlarged.", "No pneumothorax.")))
    return {
        "age": str(rng.randint(18, 90)),
        "sex": rng.choice(("female", "male")),
        "history": rng.choice(("", "smoking", "heart failure", "rheumatoid arthritis", "a kidney transplant")),
        "presentation": rng.choice(("", "cough and fever for four days", "increasing breathlessness", "chest pain")),
        "findings": " ".join(sentences),
        "comparison": rng.choice(("", "", "unchanged from the examination of last year")),
    }


def write_task(path: Path, model: Path, rows: int, shortest: int, longest: int) -> int:
    """Write prompts, output lengths and seeds for the peers; return the useful tokens."""
    from gxr_batch.job import ModelSection, PromptSection
    from gxr_batch.models.load_weights import load_tokenizer
    from gxr_batch.models.tokens import ChatEncoder
    from gxr_batch.prompts import Templates
    from gxr_batch.prompts.render import render
    from gxr_batch.run.planning import row_seed

    rng = random.Random(3)
    template = Templates(PromptSection()).default
    tokenizer = load_tokenizer(ModelSection(path=str(model)))
    encoder = ChatEncoder(tokenizer)
    encoded = [encoder.encode(render(template, findings(rng), system=SYSTEM)) for _ in range(rows)]
    ids = [one.token_ids or [] for one in encoded]
    lengths = [rng.randint(shortest, longest) for _ in range(rows)]
    task = {
        "ids": ids,
        "texts": tokenizer.batch_decode(ids),
        "lengths": lengths,
        "seeds": [row_seed(0, str(row), 1, 1) for row in range(rows)],
        "shared": [one.shared_tokens for one in encoded],
    }
    path.write_text(json.dumps(task))
    prompts = [len(one) for one in ids]
    print(
        f"{rows} prompts of {min(prompts)} to {max(prompts)} tokens, {max(task['shared'])} of them shared; answers of "
        f"{min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in total",
        flush=True,
    )
    return sum(lengths)


def model_folder(name: str) -> Path:
    """Return the bfloat16 folder of a model, converting the model if needed."""
    if name == "gemma":
        return ensure_demo_model()
    folders = {"smollm": "smollm2-135m-instruct-bf16-1", "4b": "random-gemma-3-4b-bf16-1"}
    makers = {"smollm": [SCRIPTS / "smollm.py"], "4b": [SCRIPTS.parent / "shapes.py", "4b"]}
    folder = cache_home() / "models" / folders[name]
    if not folder.is_dir():
        subprocess.run([sys.executable, *makers[name], folder], check=True)
    return folder


# ---------------------------------------------------------------------- running


def run_script(peer: Peer, task: Path, model: Path) -> dict[str, Any]:
    """Run one peer once; return its result, or {"skipped": reason}."""
    if not peer.python().exists():
        return {"skipped": peer.missing()}
    command = [peer.python(), SCRIPTS / peer.script, task, model, *peer.options]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PEER_SECONDS, check=False, env=ENVIRONMENT | os.environ
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done after {PEER_SECONDS} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(('{"tokens"', '{"skipped"')):
            found: dict[str, Any] = json.loads(line)
            return found
    words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return {"skipped": f"failed ({done.returncode}): {words[-1].strip()[:150] if words else 'no output'}"}


def best_settings(peers: list[Peer], task: Path, model: Path) -> list[Peer]:
    """Run each setting of every competitor that has several; return the peers without the slower ones."""
    settings = [peer for peer in peers if sum(bool(one.family) and one.family == peer.family for one in peers) > 1]
    if not settings:
        return peers
    outcomes, _ = run_rounds(settings, 1, task, model, called="shorter task, round")
    print("\ntokens per second in the shorter task")
    for peer in settings:
        outcome = outcomes[peer.name]
        print(f"{peer.name:<28}{outcome.problem or f'{outcome.rate:.1f}'}")
    print(flush=True)
    return [peer for peer in peers if peer not in settings or is_best(peer, settings, outcomes)]


def run_rounds(
    peers: list[Peer], rounds: int, task: Path, model: Path, called: str = "round"
) -> tuple[dict[str, Outcome], Outcome]:
    """Run every peer, and measure the machine, once per round."""
    machine, outcomes = Outcome(), {peer.name: Outcome() for peer in peers}
    for number in range(1, rounds + 1):
        for peer in [Peer("machine", "machine.py"), *peers]:
            outcome = machine if peer.name == "machine" else outcomes[peer.name]
            if outcome.problem or (number > 1 and (peer.once or not is_best(peer, peers, outcomes))):
                continue
            result = run_script(peer, task, model)
            if "skipped" in result:
                outcome.problem = result["skipped"]
            else:
                outcome.results.append(result)
            print(f"{called} {number}: {peer.name}: {_progress(outcome)}", file=sys.stderr, flush=True)
    return outcomes, machine


def is_best(peer: Peer, peers: list[Peer], outcomes: dict[str, Outcome]) -> bool:
    """Return whether no other setting of the same competitor was faster in the first round."""
    measured = [one for one in peers if peer.family and one.family == peer.family and outcomes[one.name].results]
    return not measured or peer is max(measured, key=lambda one: outcomes[one.name].rates[0])


def _progress(outcome: Outcome) -> str:
    if outcome.problem:
        return outcome.problem
    last = outcome.results[-1]
    return f"{last['tokens'] / last['seconds']:.1f} tok/s" if last["tokens"] else "measured"


# ---------------------------------------------------------------------- tables


def print_tables(peers: list[Peer], outcomes: dict[str, Outcome], useful: int) -> None:
    """Print useful tokens per second and how many times faster our best setting is; * marks each one's best setting."""
    for title, quantised in (("full precision", False), ("quantised weights", True)):
        if lines := [peer for peer in peers if peer.quantised == quantised]:
            print(f"\n{title}")
            _print_table(lines, peers, outcomes, useful)


def _print_table(lines: list[Peer], peers: list[Peer], outcomes: dict[str, Outcome], useful: int) -> None:
    ours = [peer.name for peer in lines if peer.name.startswith("ours") and outcomes[peer.name].results]
    reference = max(ours, key=lambda name: outcomes[name].rate, default="")
    print(f"{'peer':<28}{'tok/s':>8}{'min':>8}{'max':>8}{(reference or 'ours') + ' is':>18}{'MiB':>8}  note")
    for peer in lines:
        outcome = outcomes[peer.name]
        name = peer.name + "*" * (bool(peer.family) and bool(outcome.results) and is_best(peer, peers, outcomes))
        if not outcome.results:
            print(f"{name:<28}{'-':>8}{'':>42}  {outcome.problem}")
            continue
        last = outcome.results[-1]
        ratio = f"{times(outcomes[reference], outcome):.2f}x" if reference else "-"
        once = "; one round" if len(outcome.rates) == 1 else ""
        note = last["note"] + once + (f"; then {outcome.problem}" if outcome.problem else "")
        if last["tokens"] != useful:
            note += f" ({last['tokens']} tokens)"
        print(
            f"{name:<28}{outcome.rate:>8.1f}{min(outcome.rates):>8.1f}{max(outcome.rates):>8.1f}{ratio:>18}"
            f"{outcome.median('peak_mib'):>8.0f}  {note}"
        )


def print_parts(outcomes: dict[str, Outcome], machine: Outcome) -> None:
    """Print how our engine spends its time, and how close decode comes to the machine's limits."""
    ours = {name: outcome for name, outcome in outcomes.items() if outcome.results and name.startswith("ours")}
    if not ours or not machine.results:
        return
    reads, products = machine.median("bytes_a_second"), machine.median("flops_a_second")
    print(f"\nThis machine, measured between the peers: reads {reads / 1e9:.1f} GB/s, bf16 products ", end="")
    print(f"{products / 1e12:.2f} Tflop/s")
    titles = ("prefill", "decode", "sampler", "host", "slot use", "rows", "step ms", "of reads", "of products")
    print(f"{'':<26}" + "".join(f"{title:>12}" for title in titles))
    for name, outcome in ours.items():
        figures = [f"{outcome.median('shares', part):.0%}" for part in titles[:4]]
        figures += [f"{outcome.median('slot_use'):.0%}", f"{outcome.median('rows_a_step'):.1f}"]
        figures += [f"{outcome.median('step_ms'):.1f}", f"{outcome.median('decode_bytes_a_second') / reads:.0%}"]
        figures += [f"{outcome.median('decode_flops_a_second') / products:.0%}"]
        print(f"{name:<26}" + "".join(f"{figure:>12}" for figure in figures))
    print("prefill, decode, sampler, host: shares of the time; of reads, of products: how much of the machine decode")
    print("uses, counting each decode step as one read of all weights and of the cache that its rows attend to.")


def _chosen(names: str, model: str) -> list[Peer]:
    if not names and model not in PEERS_OF:
        return [peer for peer in PEERS if peer.name not in ONLY_NAMED]
    wanted = set((names or PEERS_OF[model]).split(","))
    groups = {"ours", *(peer.family for peer in PEERS if peer.family)}
    unknown = wanted - {peer.name for peer in PEERS} - groups
    if unknown:
        known = ", ".join([*sorted(groups), *(peer.name for peer in PEERS)])
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {known}")
    return [
        peer for peer in PEERS if {peer.name, peer.family} & wanted or ("ours" in wanted and peer.script == "ours.py")
    ]


def main() -> None:
    """Run the peers and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["gemma", "smollm", "4b"], default="gemma")
    parser.add_argument("--peers", default="", help="comma-separated names; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="of the best settings; the others run once")
    parser.add_argument("--rows", type=int, default=0, help="0 = 256, or 16 for the 4B shape")
    parser.add_argument("--screen", type=int, default=0, help="rows of the shorter task; 0 = none")
    parser.add_argument("--quick", action="store_true", help="answers of 4 to 16 tokens, to check that every peer runs")
    arguments = parser.parse_args()
    answers = (4, 16) if arguments.quick else ANSWERS_OF.get(arguments.model, (SHORTEST, LONGEST))
    rows = arguments.rows or ROWS_OF.get(arguments.model, 256)
    peers = _chosen(arguments.peers, arguments.model)
    model = model_folder(arguments.model)
    with tempfile.TemporaryDirectory(prefix="gxr-batch-engines-") as scratch:
        task = Path(scratch) / "task.json"
        if arguments.screen:
            write_task(task, model, arguments.screen, *(length // SCREEN_SHARE for length in answers))
            peers = best_settings(peers, task, model)
        useful = write_task(task, model, rows, *answers)
        outcomes, machine = run_rounds(peers, arguments.rounds, task, model)
    print_tables(peers, outcomes, useful)
    print_parts(outcomes, machine)


if __name__ == "__main__":
    main()
