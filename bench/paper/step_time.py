"""The machine of the paper's experiments: every constant of the model of a step's time."""

from dataclasses import dataclass

MAX_MODEL_LEN = 2048
KV_BYTES_PER_TOKEN = 2 * 40 * 5120 * 2
"""Keys and values of 40 layers of 5,120 features in float16: 800 KiB, for OPT-13B as for LLaMA-13B."""

NUM_SLOTS = 12 * 2**30 // KV_BYTES_PER_TOKEN
"""15,728 tokens in the 12 GB that 26 GB of weights leave of 40 (table 1: 15.7K)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of a 13B model on one A100-40GB with PCIe 4.0: a roofline, the same for every system.

    Args:
        num_params: number of weights, in float16.
        bandwidth: bytes/s read from HBM: 85% of 1.555 TB/s.
        flops: FLOP/s of the matrix products: half of 312 TFLOP/s.
        overhead_s: seconds of the host and of launches in every step.
        block_s: seconds that a block table adds for every block read, 23% of the time to read 16 tokens.
            Figure 18a has 20 to 26%. Contiguous KV pays nothing.
        link_bandwidth: bytes/s between host and device, each way: 25 of PCIe 4.0's 32 GB/s.
        piece_s: seconds that each contiguous piece of a transfer adds.
    """

    num_params: float = 13e9
    bandwidth: float = 0.85 * 1.555e12
    flops: float = 0.5 * 312e12
    overhead_s: float = 5e-3
    block_s: float = 0.23 * 16 * KV_BYTES_PER_TOKEN / (0.85 * 1.555e12)
    link_bandwidth: float = 25e9
    piece_s: float = 10e-6

    def compute_s(self, num_tokens: int, num_context: int, num_context_blocks: int = 0) -> float:
        """One forward pass.

        Args:
            num_tokens: tokens fed to the model: decodes and prompts.
            num_context: tokens whose KV attention reads, summed over the sequences. A block that two sequences share
                is read twice.
            num_context_blocks: blocks that hold these tokens; 0 where KV is contiguous.
        """
        weights_s = max(2 * self.num_params / self.bandwidth, num_tokens * 2 * self.num_params / self.flops)
        attention_s = num_context * KV_BYTES_PER_TOKEN / self.bandwidth + num_context_blocks * self.block_s
        return self.overhead_s + weights_s + attention_s

    def copy_s(self, num_tokens: int) -> float:
        """Copy-on-write of blocks of ``num_tokens`` tokens in all: read and written in HBM."""
        return 2 * num_tokens * KV_BYTES_PER_TOKEN / self.bandwidth

    def transfer_s(self, num_tokens: int, num_pieces: int) -> float:
        """Blocks of ``num_tokens`` tokens in all over the link, in ``num_pieces`` contiguous pieces."""
        return num_tokens * KV_BYTES_PER_TOKEN / self.link_bandwidth + num_pieces * self.piece_s

    def describe(self) -> str:
        """The model in words, for the head of the report."""
        return (
            "Step time: max(26 GB of weights / bandwidth, tokens x 26 GFLOP / matmul rate) "
            "+ KV read / bandwidth + overhead\n"
            f"  one A100-40GB: {self.bandwidth / 1e12:.2f} TB/s (85% of 1.555), {self.flops / 1e12:.0f} TFLOP/s "
            f"(50% of 312), overhead {1e3 * self.overhead_s:.0f} ms a step\n"
            f"  paged KV adds {1e6 * self.block_s:.1f} us a block read (the paper's 23% at 16 tokens); copies on write "
            "read and write HBM\n"
            f"  transfers run beside the step, {self.link_bandwidth / 1e9:.0f} GB/s each way and "
            f"{1e6 * self.piece_s:.0f} us a contiguous piece\n"
            f"Pool: {NUM_SLOTS:,} slots of {KV_BYTES_PER_TOKEN // 1024} KiB (12 GB); sequences reach {MAX_MODEL_LEN:,} "
            "tokens"
        )


A100 = StepTime()
