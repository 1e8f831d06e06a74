"""Token files: ids on disk, memory-mapped, recognised and checked before training.

checks    ids within the vocabulary, and of the width they are read as
foreign   files that are no token files, known by their names and first bytes
layouts   type, place and number of ids, from headers and neighbours
reading   one token file, several as one, and how ours are written
sidecar   facts about a token file in `tokens.bin.json`
"""

from nanochat_jax.lm.data.token_file import checks as checks, foreign as foreign
from nanochat_jax.lm.data.token_file.checks import check_ids as check_ids
from nanochat_jax.lm.data.token_file.reading import (
    TokenFile as TokenFile,
    read_shards as read_shards,
    read_tokens as read_tokens,
    write_tokens as write_tokens,
)
