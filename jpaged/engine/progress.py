"""The progress bar of a batch: requests that have ended, and the rate of tokens."""

from tqdm import tqdm

from jpaged.engine.inbox import Inbox, Mailbox


def run_with_bar(inbox: Inbox, mailbox: Mailbox) -> None:
    """Run the inbox's engine until a mailbox is complete, behind a progress bar."""
    engine = inbox.engine
    num_before = engine.num_output_tokens
    with tqdm(total=len(mailbox.request_ids), desc="Generating", unit="request") as bar:

        def update() -> None:
            bar.update(len(mailbox.results) - bar.n)
            rate = (engine.num_output_tokens - num_before) / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)

        inbox.run_until(mailbox.is_complete, after_step=update)
        update()
