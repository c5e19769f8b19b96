"""Long sequences: attention in linear time, with constant memory when decoding."""

from outlast.attention._error import AttentionErrorResult, attention_error
from outlast.attention._favor import FavorAttention, FavorState, draw_projection, favor_attention
from outlast.attention._redraw import redraw_after_steps
from outlast.attention._rfa import DenominatorReport, RandomFeatureAttention, RfaState, rfa_attention, rfa_parameter_groups
from outlast.attention._transformers import convert_attention

__all__ = [
    "AttentionErrorResult",
    "DenominatorReport",
    "FavorAttention",
    "FavorState",
    "RandomFeatureAttention",
    "RfaState",
    "attention_error",
    "convert_attention",
    "draw_projection",
    "favor_attention",
    "redraw_after_steps",
    "rfa_attention",
    "rfa_parameter_groups",
]
