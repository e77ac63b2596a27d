"""megatron-core's interleaved pipeline releases tensors right after isend; on gloo that must not change a number (P4)."""

import pytest
import torch

from mindspeed.testing import ranks
from tests.platform._activated import cpu_activated

SEQUENCE, BATCH, HIDDEN, MICROS, CHUNKS = 64, 2, 32, 4, 2


def layer(index):
    torch.manual_seed(100 + index)
    return torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Tanh())


def micro_batches():
    return list(torch.randn(MICROS, SEQUENCE, BATCH, HIDDEN, generator=torch.Generator().manual_seed(1)))


def reference(count):
    """Loss of each microbatch and gradients of `count` layers in a row, on one process."""
    layers = torch.nn.ModuleList(layer(index) for index in range(count))
    losses = []
    for x in micro_batches():
        for each in layers:
            x = each(x)
        losses.append(x.square().mean())
    (sum(losses) / MICROS).backward()
    return [loss.detach() for loss in losses], [each[0].weight.grad for each in layers]


class Chunk(torch.nn.Module):
    """One layer of the pipeline, as the schedule wants it."""

    def __init__(self, config, index, is_first):
        from megatron.core.enums import ModelType

        super().__init__()
        self.model_type = ModelType.encoder_or_decoder
        self.config, self.layer, self.is_first, self.input_tensor = config, layer(index), is_first, None

    def set_input_tensor(self, input_tensor):
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, x):
        return self.layer(x if self.is_first else self.input_tensor)


def forward_step(data_iterator, model):
    output = model(next(data_iterator))
    return output, lambda result: (result.square().mean(), {"loss": result.square().mean().detach()})


@ranks(2, megatron=True)
def test_two_stages_equal_one_process(world):
    train(world, overlap=True)  # the host allows two stages with overlap only: both neighbours are the same rank


@ranks(4, megatron=True)
@pytest.mark.parametrize("overlap", [True, False])
def test_four_stages_equal_one_process(world, overlap):
    train(world, overlap)


def train(world, overlap):
    """One step of the interleaved schedule, compared with the same layers in a row."""
    with cpu_activated():
        from megatron.core import ModelParallelConfig, parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=world.size, virtual_pipeline_model_parallel_size=CHUNKS
        )
        config = ModelParallelConfig(
            pipeline_model_parallel_size=world.size,
            virtual_pipeline_model_parallel_size=CHUNKS,
            pipeline_dtype=torch.float32,
            deallocate_pipeline_outputs=True,
            overlap_p2p_comm=overlap,
            batch_p2p_comm=not overlap,
        )
        config.hidden_size = HIDDEN
        config.microbatch_group_size_per_vp_stage = world.size
        mine = [chunk * world.size + world.rank for chunk in range(CHUNKS)]
        chunks = [Chunk(config, index, index == 0) for index in mine]
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches()) for _ in chunks],
            model=chunks,
            num_microbatches=MICROS,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        right_losses, right_gradients = reference(world.size * CHUNKS)
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            assert [entry["loss"].item() for entry in losses] == [loss.item() for loss in right_losses]
        for index, chunk in zip(mine, chunks, strict=True):
            torch.testing.assert_close(chunk.layer[0].weight.grad, right_gradients[index], rtol=1e-6, atol=1e-9)
