"""tests/tiny_run.py with FSDP2 on CPU ranks: accelerate 1.15 divides a model on accelerators only, torch over gloo too.

What is changed is accelerate's decision and nothing else: the plugin, the wrapping, the gathering and the files are the
real ones.
"""

import tiny_run
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from moai.core.stopping import end

decide = AcceleratorState.__init__


def decide_for_fsdp(self, *positional, fsdp_plugin=None, **named):
    decide(self, *positional, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = decide_for_fsdp
    end(tiny_run.main())
