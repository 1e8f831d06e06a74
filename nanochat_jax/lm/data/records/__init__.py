"""Records: documents and conversations in files of JSON lines and Parquet.

chat      conversations as ids, of which the assistant's are predicted
ids       records as ids, one after another, and which are held out
packages  packages that are imported only where they are needed
rows      the values of a field, record by record
"""

from nanochat_jax.lm.data.records.ids import Encoded as Encoded, encode as encode
