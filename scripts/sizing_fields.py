"""The config fields that decide the shapes of cache or weights, which our tables keep."""

CACHE_FIELDS = frozenset(
    """
    model_type architectures auto_map is_encoder_decoder add_cross_attention is_decoder
    num_hidden_layers num_layers n_layer n_layers decoder_layers num_decoder_layers encoder_layers
    num_attention_heads num_heads n_head n_heads decoder_attention_heads encoder_attention_heads
    num_key_value_heads num_kv_heads n_kv_heads n_head_kv multi_query multi_query_attention
    multi_query_group_num num_attention_groups num_query_heads attn_config new_decoder_architecture
    head_dim attention_head_dim kv_channels d_kv d_head hidden_size_per_head head_size dim_head
    v_head_dim qk_head_dim hidden_size d_model n_embd n_embed model_dim dim embed_dim hidden_dim
    max_position_embeddings n_positions max_sequence_length max_seq_len max_seq_length seq_length
    n_ctx model_max_length max_target_positions max_source_positions context_length prompt_length
    original_max_position_embeddings
    torch_dtype dtype kv_cache_scheme kv_cache_quant_algo
    sliding_window sliding_window_size use_sliding_window max_window_layers sliding_window_pattern
    local_attention global_attn_every_n_layers attention_chunk_size no_rope_layers
    no_rope_layer_interval layer_types layers_block_type use_bidirectional_attention
    attn_window_size window_size interleaved_sliding_window attention_window_size
    sliding_window_attn_layers swa_layers hybrid_layer_pattern swa_num_attention_heads
    swa_num_key_value_heads swa_head_dim swa_v_head_dim attention_other_setting
    sliding_attention_heads num_swa_attention_heads num_swa_key_value_heads
    sliding_window_layers conv_window full_attention_idx
    global_head_dim num_global_key_value_heads attention_k_eq_v per_layer_config
    num_kv_shared_layers kv_source_layers kv_sharing_modes use_cla cla_share_factor
    hidden_size_per_layer_input block_configs num_attention_heads_per_layer
    num_query_groups qkv_multipliers
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim use_mla mla_use_nope
    index_head_dim index_n_heads index_topk indexer_types index_topk_freq index_topk_pattern
    index_skip_topk_offset compress_ratios compress_rates sparse_attention_config
    linear_attn_config linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim
    linear_num_key_heads linear_num_value_heads linear_head_dim linear_num_heads
    full_attention_interval full_attn_idxs full_attn_mod attn_type_list attn_layer_indices
    attn_layer_period attn_layer_offset hybrid_override_pattern hybrid_layer_ids
    mtp_hybrid_override_pattern mtp_layers_block_type
    mamba_d_conv mamba_d_state mamba_d_head mamba_d_ssm mamba_expand mamba_n_groups mamba_n_heads
    mamba_num_heads mamba_head_dim mamba_ngroups mamba_ssm_dtype mamba_ssm_cache_dtype
    mamba_enabled mamba_step n_mamba_heads num_mem_blocks ssm_state_size state_size conv_kernel
    conv_L_cache expand n_groups time_step_rank chunk_size ssm_cfg conv1d_width lru_width
    block_types attention_hidden_size rescale_every qk_dim_factor v_dim_factor num_blocks
    cca_time0 cca_time1 embedding_dim
    num_nextn_predict_layers mtp_num_hidden_layers num_mtp_modules num_mtp_layers
    _num_mtp_layers mtp_transformer_layers cross_attention_layers cross_attention_interval
    text_config llm_config llm_cfg language_config thinker_config quantization_config
    decoder vlm_config generator H_cycles L_cycles num_layers_per_stack dim_head
    first_k_dense_replace prefix_dense_sliding_window_pattern layer_group_size
    short_conv_kernel_size layer_types conv_kernel_size indexer_head_dim ple_layer_ids hc_count
    ple_conv_kernel_size ngram_size mem_len emb_dim layers attention_heads num_decoder_layers
    local_layer_ids linear_conv_kernel mamba_d_inner index_kpool
    num_decoder_attention_heads decoder_ffn_dim use_dsa swa_kv_lora_rank swa_qk_nope_head_dim
    swa_qk_rope_head_dim kv_n_heads prompt_length indexer_n_heads window_size attention_types
    """.split()
)

WEIGHT_FIELDS = frozenset(
    """
    vocab_size intermediate_size ffn_dim ffn_hidden_size n_inner d_ff ffn_config tie_word_embeddings
    attention_bias mlp_bias qkv_bias use_bias bias add_qkv_bias use_qk_norm qk_norm
    num_experts num_local_experts n_routed_experts n_shared_experts num_shared_experts
    moe_intermediate_size moe_layer_freq first_k_dense_replace decoder_sparse_step mlp_only_layers
    num_experts_per_tok shared_expert_intermediate_size shared_intermediate_size
    interleave_moe_layer_step intermediate_size_mlp expert_layer_period expert_layer_offset
    n_group topk_group topk_method parallel_attn alibi word_embed_proj_dim
    use_conv_bias mamba_conv_bias mamba_proj_bias mamba_rms_norm projectors_bias mamba_dt_rank
    moe_shared_expert_intermediate_size moe_latent_size attention_out_bias lm_head_bias use_qkv_bias
    qk_layernorm use_parallel_residual do_layer_norm_before enable_bias
    layer_norm_elementwise_affine num_ln_in_parallel_attn moe_layers mlp_layer_types
    enable_moe_block
    """.split()
)

SIZING_FIELDS = CACHE_FIELDS | WEIGHT_FIELDS

NESTED = frozenset(
    """
    text_config llm_config llm_cfg language_config thinker_config decoder vlm_config generator
    """.split()
)
QUANTIZATION_FIELDS = frozenset(
    """
    quant_method quant_algo kv_cache_scheme kv_cache_quant_algo bits weight_block_size
    activation_scheme modules_to_not_convert ignore exclude_modules ignored_layers config_groups
    format group_size version zero_point checkpoint_format
    """.split()
)


def keep_sizing_fields(config: dict[str, object]) -> dict[str, object]:
    """The part of a config that sizing reads, nested text configs included, keys sorted."""
    kept: dict[str, object] = {}
    for key in sorted(SIZING_FIELDS & config.keys()):
        value = config[key]
        if key in NESTED and isinstance(value, dict):
            value = keep_sizing_fields(value)
        elif key == "quantization_config" and isinstance(value, dict):
            value = {name: value[name] for name in sorted(QUANTIZATION_FIELDS & value.keys())}
        kept[key] = value
    return kept
