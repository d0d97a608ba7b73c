"""What ties the optimizers to other libraries: all patching and every private name, one file a library.

Nothing is imported here: `hf_tam.integrations.autoload` must stay cheap in programs that never import transformers.
"""
