"""The YAML spelling of a run: RunConfig's fields as keys, the options of its workload as a mapping.

    strategy: ring
    options: {layers: 6, width: 384}
    steps: 200

Keys that are left out have their defaults.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from distsim import yamlfile
from distsim.errors import ConfigError
from trainers.config import FIELDS, RunConfig, option_text


def read(path: str) -> dict[str, Any]:
    """Return the values that a file gives, by field of RunConfig; it need not give all.

    Raises: ConfigError with file, line, key, what was expected and the nearest valid name.
    """
    document = yamlfile.read(path)
    if not isinstance(document.data, dict):
        raise document.error((), "expected `key: value` lines, as in `strategy: ring`")
    values = {}
    for key, given in document.data.items():
        if key not in FIELDS:
            hint = yamlfile.did_you_mean(key, list(FIELDS))
            raise document.error((key,), f"unknown key; expected one of: {', '.join(FIELDS)}{hint}")
        try:
            values[key] = FIELDS[key].metadata["read"](given)
        except ConfigError as error:
            raise document.error((key,), str(error)) from None
    return values


def text(config: RunConfig) -> str:
    """Return a file that `read` makes the same values of, all of them: defaults may change with the version."""
    return yamlfile.dump({name: _written(value) for name, value in asdict(config).items()})


def _written(value: Any) -> Any:
    """Return what YAML writes as one would: it has its own ideas of None and of 1e-05."""
    if isinstance(value, dict):
        return {key: _written(each) for key, each in value.items()}
    if value is None or (isinstance(value, float) and "." not in str(value)):
        return option_text(value)
    return value
