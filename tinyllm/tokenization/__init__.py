"""How text becomes token ids and back; `tinyllm.tokenizer` is the public face.

parts.py          what every kind of tokenizer provides: an encoder and the bytes of each token
byte_level.py     GPT-2's alphabet, which spells bytes as printable characters
pretokenizers.py  the regular expressions behind `tokenizer.ggml.pre`
sentencepiece.py  SentencePiece's BPE by score, with byte fallback
gguf.py           a tokenizer from GGUF metadata
huggingface.py    a tokenizer from a Hugging Face folder
streaming.py      token ids to text, one at a time
"""
