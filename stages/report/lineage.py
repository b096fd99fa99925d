"""Where the numbers come from: every run from the import to the evaluation, with the command that repeats it, and the machine."""

import shlex
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from stages.report.folders import Folder, Link, chain, number
from stages.report.html import Child, Markup, el


def provenance(folders: list[Folder]) -> list[Markup]:
    """The chain of runs as a list, inputs before what was made of them."""
    links = chain(folders)
    return [el("ol", {"class": "chain"}, [step(link) for link in links])] if links else []


def step(link: Link) -> Markup:
    record = link.record
    if not record:  # an input no stage of ours wrote
        title = [el("b", {}, "Input"), " ", el("code", {}, link.path or "unknown")]
        return el("li", {}, title, facts(["not written by mmgen, so its history ends here", fingerprint_text(link.fingerprint)]))
    command = list(record.get("command") or import_command(record))
    lasted = duration(record.get("started"), record.get("finished"))
    said = [
        str(record.get("started", "")).replace("T", " ").removesuffix("+00:00") + " UTC" if record.get("started") else "",
        f"took {lasted}" if lasted else "",
        f"seed {record['seed']}" if "seed" in record else "",
        fingerprint_text(link.fingerprint),
        *(foreign(entry) for entry in record.get("inputs") or [] if not entry.get("provenance")),
    ]
    return el(
        "li",
        {},
        el("b", {}, str(record.get("stage") or ("import" if "importer" in record else "run")).replace("-", " ").capitalize()),
        " ",
        el("code", {"class": "soft"}, link.path),
        el("pre", {}, el("code", {}, command_text(command))) if command else None,
        facts(said),
    )


def import_command(record: Mapping[str, Any]) -> list[str]:
    """The command of an import that is known by its arguments only (shards keep these, a deleted run.json does not come back)."""
    if "importer" not in record:
        return []
    arguments = dict(record.get("arguments") or {})
    source = [str(arguments.pop("source"))] if arguments.get("source") is not None else []
    flags = [word for name, value in arguments.items() if value is not None for word in ("--" + name.replace("_", "-"), str(value))]
    return ["mmgen", "import", str(record["importer"]), *source, *flags]


def facts(said: list[str]) -> Markup:
    return el("p", {"class": "facts"}, " · ".join(text for text in said if text))


def foreign(entry: Mapping[str, Any]) -> str:
    return f"from {entry.get('path', 'an input')}, whose history is not known" if entry.get("path") else ""


def fingerprint_text(fingerprint: str) -> str:
    return f"fingerprint {fingerprint[:12]}" if fingerprint else ""


def command_text(command: list[str]) -> str:
    """The command as one would type it: the program by its name, a line for each long option."""
    first = command[0].rsplit("/", 1)[-1]
    words = ["mmgen" if first in ("__main__.py", "mmgen") else first, *command[1:]]
    lines = [""]
    for word in words:
        quoted = shlex.quote(word)
        if word.startswith("--") and len(lines[-1]) + len(quoted) > 64:
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + quoted
    return " \\\n".join(lines)


def duration(started: str | None, finished: str | None) -> str:
    """How long it took; empty where the two are not known, or are no times."""
    if not started or not finished:
        return ""
    try:
        seconds = round((datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds())
    except (TypeError, ValueError):
        return ""
    if seconds < 100:
        return f"{seconds} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def machine(folders: list[Folder]) -> Markup | None:
    """Machines, versions, commits and seeds; where runs differ, all values."""
    links = [link.record for link in chain(folders) if link.record]
    if not links:
        return None
    entries: list[Child] = []

    def add(title: str, values: list[str]) -> None:
        distinct = list(dict.fromkeys(value for value in values if value))
        if distinct:
            entries.append(
                el(
                    "div",
                    {"class": "wide" if title == "Versions" else None},
                    el("dt", {}, title),
                    [el("dd", {}, value) for value in distinct],
                )
            )

    machines = [record.get("machine") or {} for record in links]
    add("Machine", [str(entry.get("platform", "")) for entry in machines])
    add("Processor", [processor(entry) for entry in machines if entry])
    add("Seeds", [", ".join(sorted({str(record["seed"]) for record in links if "seed" in record}))])
    add("Code", [str(record.get("git_commit") or "installed package")[:12] + dirty(record) for record in links])
    versions: dict[str, list[str]] = {}
    for record in links:
        for name, version in (record.get("versions") or {}).items():
            versions.setdefault(name, []).append(str(version))
    add("Versions", [", ".join(f"{name} {'/'.join(dict.fromkeys(found))}" for name, found in versions.items())])
    return el("dl", {"class": "machine"}, entries)


def processor(entry: Mapping[str, Any]) -> str:
    gpus = entry["gpus"] if isinstance(entry.get("gpus"), list) else []
    used = number(entry.get("threads"))
    threads = f", {used} thread{'s' if used > 1 else ''} used" if used else ""
    return f"{entry.get('processor', '?')}, {entry.get('cpus', '?')} CPUs{threads}" + "".join(f"; {name}" for name in gpus)


def dirty(record: Mapping[str, Any]) -> str:
    return " with uncommitted changes" if str(record.get("git_commit") or "").endswith("-dirty") else ""
