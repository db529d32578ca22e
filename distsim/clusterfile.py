"""The keys of a cluster file; `topologies` has those of `topology`.

title: "DGX H100: 8 GPUs behind NVSwitch"
source: "where the shape and the counts come from"
topology: {kind: switch, devices: 8, link: nvlink}
links:
  nvlink:
    bandwidth: {value: "450 GB/s", source: "..."}   # per direction
    latency: {value: "2 us", source: "..."}         # end to end; or `hop_latency`, paid on every cable
    overhead: {value: "1 us", source: "..."}        # optional: each message holds the link so much longer
# The rest is optional:
reduce:                                             # without it additions are free
  bandwidth: {value: "1 TB/s", source: "..."}       # bytes of one operand that a device adds per second
host:
  overhead: {value: "3 us", source: "..."}          # time of a device's host for each operation that it sends
sharing: fair                                       # messages share a link max-min fairly, or `fifo`: one by one
routing: first                                      # of equally short routes: the first in file order, or `ecmp`: by
                                                    # a hash of (source, destination), as fat trees have it by default
overrides:                                          # applied in order; names may be patterns: node3.*, gpu[0-3]
  - {from: leaf0, to: spine1, both: true, failed: true}
  - {from: node3.nic0.out, to: "*", bandwidth: {value: "25 GB/s", source: "..."}}
  - {from: gpu0, to: switch, slowdown: 4}           # a link: its bandwidth divided by 4
  - {device: gpu7, slowdown: 2}                     # a straggler: its additions and host overhead take twice as long
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distsim import topologies
from distsim.errors import ConfigError
from distsim.validation import BandwidthQuantity, Fields, Flag, Name, Slowdown, Text, TimeQuantity, one_of


class LinkEntry(Fields):
    """One kind of link; the bandwidth is that of one direction."""

    bandwidth: BandwidthQuantity = Field(examples=['{value: "450 GB/s", source: "..."}'])
    latency: TimeQuantity | None = Field(default=None, examples=['{value: "2 us", source: "..."}'])
    hop_latency: TimeQuantity | None = Field(default=None, examples=['{value: "500 ns", source: "..."}'])
    overhead: TimeQuantity | None = Field(default=None, examples=['{value: "2 us", source: "..."}'])

    @model_validator(mode="after")
    def _one_latency(self) -> LinkEntry:
        if self.latency is None and self.hop_latency is None:
            raise ConfigError('the key \'latency\' is missing; expected latency: {value: "2 us", source: "..."}')
        if self.latency is not None and self.hop_latency is not None:
            raise ConfigError("`latency` is end to end and `hop_latency` per cable; expected one of them")
        return self

    def link(self) -> topologies.Link:
        """Return the numbers without their sources."""
        latency = self.latency or self.hop_latency
        assert latency is not None
        return topologies.Link(
            latency_s=latency.value,
            bandwidth_Bps=self.bandwidth.value,
            overhead_s=self.overhead.value if self.overhead is not None else 0.0,
            down_s=self.hop_latency.value if self.hop_latency is not None else 0.0,
        )


class ReduceEntry(Fields):
    """How fast one device adds an array to another, in bytes of one operand per second."""

    bandwidth: BandwidthQuantity = Field(examples=['{value: "1 TB/s", source: "..."}'])


class HostEntry(Fields):
    """What the host of a device does for it."""

    overhead: TimeQuantity = Field(examples=['{value: "3 us", source: "..."}'])


_CHANGES = ("failed", "slowdown", "bandwidth", "latency", "overhead")


class Override(Fields):
    """What is different about some links (`from`, `to`) or devices (`device`)."""

    src: Name | None = Field(default=None, alias="from", examples=['"node3.*"'])
    dst: Name | None = Field(default=None, alias="to", examples=['"*"'])
    both: Flag = Field(default=False, examples=["true"])
    device: Name | None = Field(default=None, examples=["node3.gpu0"])
    failed: Flag = Field(default=False, examples=["true"])
    slowdown: Slowdown | None = Field(default=None, examples=["4"])
    bandwidth: BandwidthQuantity | None = Field(default=None, examples=['{value: "25 GB/s", source: "..."}'])
    latency: TimeQuantity | None = Field(default=None, examples=['{value: "2 us", source: "..."}'])
    overhead: TimeQuantity | None = Field(default=None, examples=['{value: "2 us", source: "..."}'])

    @model_validator(mode="after")
    def _one_target(self) -> Override:
        changes = [key for key in _CHANGES if getattr(self, key)]
        if self.device is not None:
            if self.src is not None or self.dst is not None or self.both:
                raise ConfigError("a device and a link at once; expected `device`, or `from` and `to`")
            if changes != ["slowdown"]:
                raise ConfigError("a device can only be slowed down; expected {device: gpu7, slowdown: 2}")
        elif self.src is None or self.dst is None:
            raise ConfigError("which link or device is missing; expected `from` and `to`, or `device`")
        elif not changes:
            raise ConfigError(f"nothing is changed; expected one of: {', '.join(_CHANGES)}")
        elif self.failed and len(changes) > 1:
            raise ConfigError(f"a failed link has no {changes[1]}; expected `failed: true` alone")
        elif self.slowdown is not None and self.bandwidth is not None:
            raise ConfigError("a slowdown and a bandwidth at once; expected one of them")
        return self


class ClusterFile(Fields):
    """The file as a whole."""

    title: Text = Field(max_length=200, examples=['"what this cluster is"'])
    source: Text = Field(examples=['"where the shape and the counts come from"'])
    topology: topologies.Topology = Field(examples=["{kind: switch, devices: 8, link: nvlink}"])
    links: dict[Name, LinkEntry] = Field(examples=["a mapping of names to links"])
    reduce: ReduceEntry | None = Field(default=None, examples=['{bandwidth: {value: "1 TB/s", source: "..."}}'])
    host: HostEntry | None = Field(default=None, examples=['{overhead: {value: "3 us", source: "..."}}'])
    sharing: Annotated[Literal["fair", "fifo"], one_of("fair", "fifo")] = Field(default="fair", examples=["fifo"])
    routing: Annotated[Literal["first", "ecmp"] | None, one_of("first", "ecmp")] = Field(
        default=None, examples=["ecmp"]
    )
    overrides: tuple[Override, ...] = Field(default=(), examples=["[{device: gpu7, slowdown: 2}]"])
