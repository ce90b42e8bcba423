"""List families of Hugging Face encoders at tiny sizes, as data for `bench.encoders`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """Describe one family and one way to read it.

    Args:
        name: how it is called in the table, and in `--only`.
        model: its class in transformers, which AutoModel finds again.
        config: what differs from `SIZES`; a dictionary inside is the configuration of a part.
        prepare: of texts a kind of tokenizer, see `TOKENS`; else a class of transformers and its arguments.
        layers: the option that the pooling needs, where it finds no layers by itself.
        part: the way to the encoder inside the model, for the independent average; `get_encoder()` may be in it.
        hooks: the list of layers inside this part whose outputs are averaged; empty: `hidden_states[1:]` are.
        layout: axes of a layer's output: batch, positions (several), features.
        valid: how many entries of the batch's mask make one position; 0: all positions of an example alone are valid.
        without: entries of a batch that the encoder itself cannot take.
        note: what a reader should know.
    """

    name: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Any = None
    layers: str | None = None
    part: str = ""
    hooks: str = ""
    layout: str = "bpf"
    valid: int = 0
    without: tuple[str, ...] = ()
    note: str = ""


# what a configuration has of these it gets
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 160, "image_size": 32, "patch_size": 8,
    "embedding_size": 32, "encoder_attention_heads": 2, "decoder_layers": 1, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_dim": 64, "d_ff": 64, "d_kv": 16, "hidden_dropout_prob": 0.0,
}  # fmt: skip

# (special tokens in the order of their ids, template of a text, names of the batch's entries)
TOKENS = {
    "bert": (
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
          "mask_token": "[MASK]"},
        "[CLS] $A [SEP]",
        ("input_ids", "token_type_ids", "attention_mask"),
    ),
    "roberta": (
        {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"},
        "<s> $A </s>",
        ("input_ids", "attention_mask"),
    ),
    "t5": (
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "$A </s>",
        ("input_ids", "attention_mask"),
    ),
    "llama": (
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "<s> $A",
        ("input_ids", "attention_mask"),
    ),
    "gpt": ({"eos_token": "<|endoftext|>", "unk_token": "<unk>"}, "$A", ("input_ids", "attention_mask")),
    "clip": (
        {"unk_token": "<unk>", "bos_token": "<|startoftext|>", "pad_token": "<pad>", "eos_token": "<|endoftext|>"},
        "<|startoftext|> $A <|endoftext|>",
        ("input_ids", "attention_mask"),
    ),
    "xlnet": (
        {"unk_token": "<unk>", "pad_token": "<pad>", "sep_token": "<sep>", "cls_token": "<cls>"},
        "$A <sep> <cls>",
        ("input_ids", "token_type_ids", "attention_mask"),
    ),
}  # fmt: skip


_TWO_TOWERS = {"text_config": {}, "vision_config": {}, "projection_dim": 32}


def _stage(layers: str, layout: str = "bpf") -> dict[str, str]:
    """Return arguments of `Entry` for an encoder whose stages differ in width or length: one stage is read."""
    return {"layers": layers, "hooks": layers, "layout": layout}


TEXT = [
    Entry("BERT", "BertModel", prepare="vocab.txt"),
    Entry("BERT, one layer", "BertModel", {"num_hidden_layers": 1}, "vocab.txt", "encoder.layer"),
    Entry("RoBERTa", "RobertaModel", prepare="roberta"),
    Entry("RoBERTa pre-norm", "RobertaPreLayerNormModel", prepare="roberta", hooks="encoder.layer"),
    Entry("XLM-RoBERTa", "XLMRobertaModel", prepare="roberta"),
    Entry("XLM-RoBERTa-XL", "XLMRobertaXLModel", prepare="roberta", hooks="encoder.layer"),
    Entry("CamemBERT", "CamembertModel", prepare="roberta"),
    Entry("ALBERT", "AlbertModel", prepare="bert", note="one layer that runs three times"),
    Entry("DistilBERT", "DistilBertModel", {"hidden_dim": 64}, "bert"),
    Entry("DeBERTa", "DebertaModel", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "bert"),
    Entry("DeBERTa-v2", "DebertaV2Model", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "bert"),
    Entry("ELECTRA", "ElectraModel", prepare="bert"),
    Entry("ERNIE", "ErnieModel", prepare="bert"),
    Entry("MPNet", "MPNetModel", prepare="roberta"),
    Entry("FNet", "FNetModel", prepare="bert"),
    Entry("XLNet", "XLNetModel", {"d_model": 32, "n_layer": 3, "n_head": 2, "d_head": 16, "d_inner": 64}, "xlnet",
          hooks="layer", layout="pbf"),
    Entry("SqueezeBERT", "SqueezeBertModel", prepare="bert"),
    Entry("RemBERT", "RemBertModel", {"input_embedding_size": 16}, "bert"),
    Entry("Megatron-BERT", "MegatronBertModel", prepare="bert", hooks="encoder.layer"),
    Entry("I-BERT", "IBertModel", prepare="roberta"),
    Entry("MobileBERT", "MobileBertModel", {"intra_bottleneck_size": 16, "num_feedforward_networks": 1}, "bert"),
    Entry("ConvBERT", "ConvBertModel", prepare="bert"),
    Entry("RoFormer", "RoFormerModel", prepare="bert"),
    Entry("Nystromformer", "NystromformerModel", {"num_landmarks": 8, "segment_means_seq_len": 8}, "bert"),
    Entry("YOSO", "YosoModel", prepare="bert"),
    Entry("LayoutLM", "LayoutLMModel", prepare="bert"),
    Entry("MRA", "MraModel", prepare="bert"),
    Entry("Longformer", "LongformerModel", {"attention_window": [8, 8, 8]}, "roberta"),
    Entry("BigBird, full", "BigBirdModel", {"attention_type": "original_full"}, "bert"),
    Entry("BigBird, sparse", "BigBirdModel", {"block_size": 4, "num_random_blocks": 1}, "bert", hooks="encoder.layer",
          valid=1),
    Entry("Funnel", "FunnelModel", {"block_sizes": [2, 1], "num_decoder_layers": 2, "d_inner": 64}, "bert",
          **_stage("decoder.layers")),
    Entry("CANINE", "CanineModel", {"local_transformer_stride": 16, "num_hash_buckets": 256}, ("CanineTokenizer", {}),
          hooks="encoder.layer", note="layers run on every fourth character"),
    Entry("ModernBERT", "ModernBertModel", {"local_attention": 8, "global_attn_every_n_layers": 2}, "bert",
          hooks="layers"),
    Entry("NomicBERT", "NomicBertModel", prepare="bert"),
    Entry("GTE", "GteModel", prepare="bert"),
    Entry("Jina v3", "JinaEmbeddingsV3Model", prepare="roberta"),
    Entry("EuroBERT", "EuroBertModel", prepare="llama", hooks="layers"),
    Entry("ESM", "EsmModel", {"position_embedding_type": "rotary", "token_dropout": False}, "bert",
          hooks="encoder.layer"),
    Entry("XLM", "XLMModel", {"emb_dim": 32, "n_layers": 3, "n_heads": 2}, "roberta", "layer_norm2"),
    Entry("FlauBERT", "FlaubertModel", {"emb_dim": 32, "n_layers": 3, "n_heads": 2}, "roberta", "layer_norm2"),
    Entry("Reformer", "ReformerModel", {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]}, "t5"),
    Entry("T5", "T5Model", prepare="t5", part="get_encoder()", hooks="block"),
    Entry("T5 encoder", "T5EncoderModel", prepare="t5", part="get_encoder()", hooks="block"),
    Entry("mT5", "MT5Model", prepare="t5", part="get_encoder()", hooks="block"),
    Entry("UMT5", "UMT5Model", prepare="t5", part="get_encoder()", hooks="block"),
    Entry("LongT5", "LongT5Model", {"local_radius": 4}, "t5", part="get_encoder()", hooks="block"),
    Entry("Switch", "SwitchTransformersModel", {"num_experts": 2}, "t5", part="get_encoder()", hooks="block"),
    Entry("BART", "BartModel", prepare="roberta", part="get_encoder()"),
    Entry("mBART", "MBartModel", prepare="roberta", part="get_encoder()", hooks="layers"),
    Entry("Pegasus", "PegasusModel", prepare="t5", part="get_encoder()", hooks="layers"),
    Entry("Marian", "MarianModel", prepare="t5", part="get_encoder()"),
    Entry("M2M-100", "M2M100Model", prepare="roberta", part="get_encoder()", hooks="layers"),
    Entry("LED", "LEDModel", {"attention_window": [8, 8, 8]}, "roberta", part="get_encoder()"),
    Entry("ProphetNet", "ProphetNetModel", {"num_encoder_layers": 3, "num_encoder_attention_heads": 2,
          "num_decoder_layers": 1, "num_decoder_attention_heads": 2}, "bert", part="get_encoder()"),
    Entry("GPT-2", "GPT2Model", prepare="gpt", hooks="h"),
    Entry("GPT-Neo", "GPTNeoModel", {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
          "gpt", hooks="h"),
    Entry("GPT-J", "GPTJModel", {"rotary_dim": 8}, "gpt", hooks="h"),
    Entry("GPT-NeoX", "GPTNeoXModel", prepare="gpt", hooks="layers"),
    Entry("OPT", "OPTModel", {"word_embed_proj_dim": 32}, "roberta", hooks="decoder.layers"),
    Entry("Bloom", "BloomModel", prepare="t5", hooks="h"),
    Entry("MPT", "MptModel", prepare="gpt", hooks="blocks"),
    Entry("Falcon", "FalconModel", prepare="gpt", hooks="h"),
    Entry("Llama", "LlamaModel", prepare="llama", hooks="layers"),
    Entry("Mistral", "MistralModel", {"sliding_window": 8}, "llama", hooks="layers"),
    Entry("Mixtral", "MixtralModel", {"num_local_experts": 2}, "llama", hooks="layers"),
    Entry("Qwen2", "Qwen2Model", prepare=("Qwen2Tokenizer", {}), hooks="layers"),
    Entry("Qwen3", "Qwen3Model", prepare="gpt", hooks="layers"),
    Entry("Gemma", "GemmaModel", prepare="llama", hooks="layers"),
    Entry("Gemma 2", "Gemma2Model", {"sliding_window": 8}, "llama", hooks="layers"),
    Entry("Gemma 3", "Gemma3TextModel", {"sliding_window": 8}, "llama", hooks="layers"),
    Entry("Phi", "PhiModel", prepare="gpt", hooks="layers"),
    Entry("Phi-3", "Phi3Model", prepare="llama", hooks="layers"),
    Entry("OLMo-2", "Olmo2Model", prepare="gpt", hooks="layers"),
    Entry("SmolLM3", "SmolLM3Model", prepare="gpt", hooks="layers"),
    Entry("Mamba", "MambaModel", prepare="gpt", hooks="layers"),
    Entry("Mamba-2", "Mamba2Model", {"num_heads": 4, "n_groups": 1, "chunk_size": 8, "state_size": 8}, "gpt",
          hooks="layers"),
    Entry("RWKV", "RwkvModel", prepare="gpt", hooks="blocks"),
    Entry("CLIP text", "CLIPTextModel", prepare="clip"),
    Entry("CLIP, its texts", "CLIPModel", _TWO_TOWERS, "clip", "text_model.encoder.layers", "text_model"),
    Entry("SigLIP, its texts", "SiglipModel", _TWO_TOWERS, "clip", "text_model.encoder.layers", "text_model"),
]  # fmt: skip

_VIT = ("ViTImageProcessor", {"size": {"height": 32, "width": 32}})
_SQUARE = {"size": {"height": 32, "width": 32}}
_EDGE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
_EDGE_64 = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
_FOUR = {"depths": [2, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "patch_size": 4}

VISION = [
    Entry("ViT", "ViTModel", prepare=_VIT),
    Entry("DeiT", "DeiTModel", prepare=("DeiTImageProcessor", _EDGE | _SQUARE)),
    Entry("BEiT", "BeitModel", {"use_relative_position_bias": True}, ("BeitImageProcessor", _SQUARE)),
    Entry("Data2Vec vision", "Data2VecVisionModel", prepare=("BeitImageProcessor", _SQUARE)),
    Entry("DINOv2", "Dinov2Model", prepare=("BitImageProcessor", _EDGE)),
    Entry("DINOv2, registers", "Dinov2WithRegistersModel", prepare=("BitImageProcessor", _EDGE)),
    Entry("DINOv3 ViT", "DINOv3ViTModel", prepare=_VIT),
    Entry("ViT-MAE", "ViTMAEModel", {"decoder_hidden_size": 32, "decoder_num_attention_heads": 2}, _VIT,
          note="hides patches at random"),
    Entry("ViT-MSN", "ViTMSNModel", prepare=_VIT),
    Entry("I-JEPA", "IJepaModel", prepare=_VIT),
    Entry("YOLOS", "YolosModel", {"image_size": [32, 32], "num_detection_tokens": 4},
          ("YolosImageProcessor", {"size": {"height": 32, "width": 32}})),
    Entry("DPT", "DPTModel", {"backbone_out_indices": [0, 1, 2], "neck_hidden_sizes": [8, 8, 8, 8]}, _VIT),
    Entry("CLIP vision", "CLIPVisionModel", prepare=("CLIPImageProcessor", _EDGE)),
    Entry("CLIP, its images", "CLIPModel", _TWO_TOWERS, ("CLIPImageProcessor", _EDGE),
          "vision_model.encoder.layers", "vision_model"),
    Entry("SigLIP vision", "SiglipVisionModel", prepare=("SiglipImageProcessor", _SQUARE)),
    Entry("SigLIP, its images", "SiglipModel", _TWO_TOWERS, ("SiglipImageProcessor", _SQUARE),
          "vision_model.encoder.layers", "vision_model"),
    Entry("SigLIP 2, NaFlex", "Siglip2VisionModel", {"num_patches": 16},
          ("Siglip2ImageProcessor", {"patch_size": 8, "max_num_patches": 16}), valid=1),
    Entry("AIMv2", "Aimv2VisionModel", prepare=("CLIPImageProcessor", _EDGE)),
    Entry("MLCD", "MLCDVisionModel", prepare=("CLIPImageProcessor", _EDGE)),
    Entry("InternVL vision", "InternVLVisionModel", {"image_size": [32, 32], "patch_size": [8, 8]}, _VIT),
    Entry("Pixtral vision", "PixtralVisionModel", prepare=("PixtralImageProcessor",
          {"size": {"longest_edge": 32}, "patch_size": {"height": 8, "width": 8}})),
    Entry("SAM vision", "SamVisionModel", {"window_size": 2, "global_attn_indexes": [2], "output_channels": 8,
          "mlp_dim": 64}, ("SamImageProcessor", {"size": {"longest_edge": 32}, "pad_size": {"height": 32,
          "width": 32}}),
          layout="bppf"),
    Entry("VitDet", "VitDetModel", {"window_size": 2, "window_block_indices": [0]}, _VIT,
          layout="bfpp"),
    Entry("ImageGPT", "ImageGPTModel", {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "vocab_size": 5},
          ("ImageGPTImageProcessor", {"size": {"height": 8, "width": 8}, "clusters": [[-1, -1, -1], [-0.3, 0, 0.2],
           [0, 0.5, 0], [1, 1, 1]]}), hooks="h"),
    Entry("Swin", "SwinModel", {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [2, 2, 4], "patch_size": 4,
          "window_size": 2}, _VIT, **_stage("encoder.layers.2.blocks")),
    Entry("Swin V2", "Swinv2Model", {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [2, 2, 4], "patch_size": 4,
          "window_size": 2}, _VIT, **_stage("encoder.layers.2.blocks")),
    Entry("Hiera", "HieraModel", {"embed_dim": 16, "image_size": [32, 32], "patch_size": [7, 7], "depths": [1, 1, 2],
          "num_heads": [1, 2, 4], "num_query_pool": 2, "masked_unit_size": [4, 4], "masked_unit_attention":
          [True, True, False]}, _VIT, **_stage("encoder.stages.2.layers")),
    Entry("PVT", "PvtModel", _FOUR | {"num_attention_heads": [1, 2, 2, 2], "sequence_reduction_ratios": [4, 2, 1, 1]},
          ("PvtImageProcessor", _SQUARE), **_stage("encoder.block.0")),
    Entry("PVT v2", "PvtV2Model", _FOUR | {"num_attention_heads": [1, 2, 2, 2], "sr_ratios": [4, 2, 1, 1]},
          ("PvtImageProcessor", _SQUARE), **_stage("encoder.layers.0.blocks")),
    Entry("SegFormer", "SegformerModel", _FOUR | {"num_attention_heads": [1, 2, 2, 2], "sr_ratios": [4, 2, 1, 1],
          "decoder_hidden_size": 16,
          "num_encoder_blocks": 4}, ("SegformerImageProcessor", _SQUARE), **_stage("stages.0.blocks")),
    Entry("LeViT", "LevitModel", {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 2],
          "key_dim": [8, 8, 8], "patch_size": 16, "image_size": 64}, ("LevitImageProcessor", _EDGE_64),
          **_stage("encoder.stages.2.layers")),
    Entry("ConvNeXT", "ConvNextModel", _FOUR | {"num_stages": 4}, ("ConvNextImageProcessor",
          {"size": {"shortest_edge": 32}}),
          **_stage("encoder.stages.0.layers", "bfpp")),
    Entry("ConvNeXT V2", "ConvNextV2Model", _FOUR | {"num_stages": 4}, ("ConvNextImageProcessor",
          {"size": {"shortest_edge": 32}}),
          **_stage("encoder.stages.0.layers", "bfpp")),
    Entry("ResNet", "ResNetModel", _FOUR | {"embedding_size": 16}, _VIT, **_stage("encoder.stages.0.layers", "bfpp")),
    Entry("RegNet", "RegNetModel", _FOUR | {"embedding_size": 16, "groups_width": 8}, _VIT,
          **_stage("encoder.stages.0.layers", "bfpp")),
    Entry("BiT", "BitModel", _FOUR | {"embedding_size": 16, "num_groups": 4}, ("BitImageProcessor", _EDGE),
          **_stage("encoder.stages.0.layers", "bfpp")),
    Entry("EfficientNet", "EfficientNetModel", {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
          ("EfficientNetImageProcessor", _SQUARE), **_stage("encoder.blocks", "bfpp")),
    Entry("MobileNet V2", "MobileNetV2Model", {"depth_multiplier": 0.25, "min_depth": 4}, _VIT, "layer", hooks="layer",
          layout="bfpp"),
    Entry("MobileViT", "MobileViTModel", {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 32],
          "patch_size": 2}, ("MobileViTImageProcessor", _EDGE | {"size": {"shortest_edge": 36}}),
          **_stage("encoder.layer.2.transformer.layer")),
    Entry("PoolFormer", "PoolFormerModel", {"hidden_sizes": [16, 32, 32, 64], "depths": [2, 1, 1, 1]},
          ("PoolFormerImageProcessor", _EDGE), **_stage("encoder.block.0", "bfpp")),
    Entry("SwiftFormer", "SwiftFormerModel", {"depths": [2, 1, 1, 1], "embed_dims": [16, 24, 32, 32]}, _VIT,
          **_stage("encoder.network.0.blocks", "bfpp")),
    Entry("FocalNet", "FocalNetModel", {"embed_dim": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [2, 1, 1, 1],
          "focal_levels": [1, 1, 1, 1], "focal_windows": [3, 3, 3, 3], "patch_size": 4}, _VIT,
          **_stage("encoder.stages.0.layers")),
    Entry("CvT", "CvtModel", {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, _VIT,
          **_stage("encoder.stages.2.layers")),
]  # fmt: skip

_CONV = {
    "conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 2], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 3,
}  # fmt: skip
_LAYER = _CONV | {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
_GROUP = _CONV | {"feat_extract_norm": "group"}
_SOUND = ("Wav2Vec2FeatureExtractor", {"return_attention_mask": True})
_WHISPER = ("WhisperFeatureExtractor", {"feature_size": 16, "chunk_length": 1})
_MEL = ("SeamlessM4TFeatureExtractor", {"feature_size": 16, "num_mel_bins": 16, "stride": 2})

SPEECH = [
    Entry("Wav2Vec2, group norm", "Wav2Vec2Model", _GROUP, _SOUND),
    Entry("Wav2Vec2, layer norm", "Wav2Vec2Model", _LAYER, _SOUND),
    Entry("HuBERT", "HubertModel", _LAYER, _SOUND),
    Entry("HuBERT, group norm", "HubertModel", _GROUP, _SOUND),
    Entry("HuBERT, conv_pos_batch_norm", "HubertModel", _LAYER | {"conv_pos_batch_norm": True}, _SOUND),
    Entry("WavLM, group norm", "WavLMModel", _GROUP, _SOUND),
    Entry("WavLM, layer norm", "WavLMModel", _LAYER, _SOUND),
    Entry("UniSpeech", "UniSpeechModel", _LAYER, _SOUND),
    Entry("UniSpeech-SAT", "UniSpeechSatModel", _LAYER, _SOUND),
    Entry("Data2Vec audio", "Data2VecAudioModel", _CONV | {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7},
          _SOUND),
    Entry("Wav2Vec2-Conformer", "Wav2Vec2ConformerModel", _CONV | {"feat_extract_norm": "layer",
          "conv_depthwise_kernel_size": 5}, _SOUND),
    Entry("SEW", "SEWModel", _CONV | {"feat_extract_norm": "layer", "squeeze_factor": 2}, _SOUND),
    Entry("SEW-D", "SEWDModel", _CONV | {"feat_extract_norm": "layer", "squeeze_factor": 2, "position_buckets": 16},
          _SOUND),
    Entry("Wav2Vec2-BERT", "Wav2Vec2BertModel", {"feature_projection_input_dim": 32, "conv_depthwise_kernel_size": 5},
          _MEL, valid=1),
    Entry("SeamlessM4T speech", "SeamlessM4TModel", {"hidden_size": 32, "speech_encoder_layers": 3,
          "speech_encoder_attention_heads": 2, "speech_encoder_intermediate_size": 64, "feature_projection_input_dim":
          32, "encoder_layers": 1, "decoder_layers": 1, "t2u_encoder_layers": 1, "t2u_decoder_layers": 1,
          "unit_embed_dim": 8, "lang_embed_dim": 8, "spkr_embed_dim": 8, "upsample_initial_channel": 32,
          "vocab_size": 50, "t2u_vocab_size": 50, "unit_hifi_gan_vocab_size": 50}, _MEL,
          "speech_encoder.encoder.layers", "speech_encoder", valid=1, hooks="encoder.layers"),
    Entry("Whisper", "WhisperModel", {"num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 16},
          _WHISPER, part="get_encoder()", valid=2, without=("attention_mask",),
          note="pads to its window by itself and takes no mask", hooks="layers"),
    Entry("Speech2Text", "Speech2TextModel", {"input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions":
          200, "max_target_positions": 16}, ("Speech2TextFeatureExtractor", {"feature_size": 16, "num_mel_bins": 16}),
          part="get_encoder()", hooks="layers"),
    Entry("SpeechT5", "SpeechT5Model", _LAYER, ("SpeechT5FeatureExtractor", {}), "encoder.wrapped_encoder.layers",
          part="encoder", note="AutoModel loads it without what makes sound its input"),
    Entry("Moonshine", "MoonshineModel", {"encoder_num_hidden_layers": 3, "encoder_num_attention_heads": 2,
          "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "encoder_num_key_value_heads": 2,
          "decoder_num_key_value_heads": 2}, _SOUND, "layers", "get_encoder()", "layers"),
    Entry("Parakeet", "ParakeetEncoder", {"subsampling_conv_channels": 8, "num_mel_bins": 16},
          ("ParakeetFeatureExtractor", {"feature_size": 16}), valid=8),
    Entry("LASR", "LasrEncoder", {"subsampling_conv_channels": 8, "num_mel_bins": 16, "conv_kernel_size": 5},
          ("LasrFeatureExtractor", {"feature_size": 16}), hooks="layers"),
    Entry("AST", "ASTModel", {"num_mel_bins": 16, "max_length": 64, "patch_size": 8, "frequency_stride": 8,
          "time_stride": 8}, ("ASTFeatureExtractor", {"num_mel_bins": 16, "max_length": 64}),
          note="pads to its window by itself and takes no mask"),
    Entry("CLAP, its sounds", "ClapModel", {"text_config": {}, "projection_dim": 32, "audio_config": {"spec_size": 32,
          "num_mel_bins": 16, "patch_embeds_hidden_size": 16,
          "depths": [1, 1, 2], "num_attention_heads": [2, 2, 4], "window_size": 2, "patch_stride": [4, 4],
          "patch_size": 4, "hidden_size": 64}}, ("ClapFeatureExtractor", {"sampling_rate": 16000, "hop_length": 320,
          "max_length_s": 1, "feature_size": 16, "fft_window_size": 400, "frequency_max": 8000,
          "truncation": "rand_trunc"}), "audio_model.audio_encoder.layers.2.blocks", "audio_model",
          "audio_encoder.layers.2.blocks"),
    Entry("Qwen2-Audio encoder", "Qwen2AudioEncoder", {"num_mel_bins": 16, "max_source_positions": 50, "d_model": 32,
          "encoder_layers": 3}, _WHISPER, valid=2, without=("attention_mask",), hooks="layers"),
    Entry("Voxtral encoder", "VoxtralEncoder", {"num_mel_bins": 16, "max_source_positions": 50},
          _WHISPER, valid=2, without=("attention_mask",), hooks="layers"),
    Entry("GLM-ASR encoder", "GlmAsrEncoder", {"num_mel_bins": 16},
          _WHISPER, valid=2, without=("attention_mask",), hooks="layers"),
]  # fmt: skip

ENTRIES = {"text": TEXT, "vision": VISION, "speech": SPEECH}
