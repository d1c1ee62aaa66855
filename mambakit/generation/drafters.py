"""Drafters: proposals of the next tokens, from the text itself or from a smaller model."""

from mambakit.decoding.draft_model import DraftModel as DraftModel
from mambakit.decoding.drafting import Draft as Draft
from mambakit.decoding.drafting import Drafter as Drafter
from mambakit.decoding.prompt_lookup import PromptLookup as PromptLookup
