"""Text in and out: tokenizer, chat template, incremental detokenizer, stop strings."""

from kvasir_engine.text.chat import ChatTemplate
from kvasir_engine.text.output import Detokenizer, OutputText, TextChunk
from kvasir_engine.text.stop import StopChecker
from kvasir_engine.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "OutputText", "StopChecker", "TextChunk", "Tokenizer"]
