//! Self-attention split by heads.

use std::borrow::Borrow;

use tch::{Kind, Tensor, nn};

use super::{
    ColumnParallelLinear, LinearInit, ParallelDropout, ParallelLinearConfig, RowParallelLinear,
    check_positive,
};
use crate::model_parallel::escape::or_raise;
use crate::{Error, ProcessGroup, Result};

/// What kind of self-attention.
///
/// ```
/// use tch_distributed::model_parallel::tensor::AttentionConfig;
/// let config = AttentionConfig { heads: 8, ..Default::default() };
/// assert!(config.causal && config.bias && config.kv_heads.is_none());
/// ```
#[derive(Clone, Copy, Debug)]
pub struct AttentionConfig {
    /// The number of heads of the whole layer (default: 1); it must divide by the size of the group.
    pub heads: i64,
    /// Fewer heads for keys and values, each shared by several query heads (default: as many as `heads`). It must
    /// divide `heads`, and divide by the size of the group.
    pub kv_heads: Option<i64>,
    /// A position sees itself and those before it only (default: yes).
    pub causal: bool,
    /// Whether the linear layers have a bias (default: yes).
    pub bias: bool,
    /// Input and output are each rank's part of the sequence (default: no).
    pub sequence_parallel: bool,
    /// The initial weights of query, key and value.
    pub qkv_init: LinearInit,
    /// The initial weights of the output's projection.
    pub out_init: LinearInit,
}

impl Default for AttentionConfig {
    fn default() -> Self {
        Self {
            heads: 1,
            kv_heads: None,
            causal: true,
            bias: true,
            sequence_parallel: false,
            qkv_init: LinearInit::default(),
            out_init: LinearInit::default(),
        }
    }
}

/// Self-attention over `[batch, sequence, width]`: each rank has some of the heads.
///
/// Query, key and value are one fused column-parallel layer `qkv` (first all queries, then all keys, then all
/// values), the projection `out` is row-parallel.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn, nn::Module};
/// use tch_distributed::model_parallel::tensor::{AttentionConfig, ParallelSelfAttention};
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let config = AttentionConfig { heads: 4, ..Default::default() };
///     let attention = ParallelSelfAttention::new(&vs.root(), 8, config, &group).unwrap();
///     assert_eq!(vs.variables()["qkv.weight"].size(), [12, 8]); // 2 of 4 heads, of width 2, three times
///     let xs = Tensor::ones([1, 5, 8], (Kind::Float, Device::Cpu));
///     assert_eq!(attention.forward(&xs).size(), [1, 5, 8]);
/// });
/// ```
#[derive(Debug)]
pub struct ParallelSelfAttention {
    qkv: ColumnParallelLinear,
    out: RowParallelLinear,
    heads: i64,
    kv_heads: i64,
    head_width: i64,
    causal: bool,
    dropout: Option<ParallelDropout>,
    group: ProcessGroup,
}

impl ParallelSelfAttention {
    /// Attention over vectors of `width`.
    ///
    /// # Errors
    /// `InvalidArgument` where heads do not divide the width, or do not divide by the size of the group; those of the
    /// group's collectives.
    pub fn new<'a>(
        path: impl Borrow<nn::Path<'a>>,
        width: i64,
        config: AttentionConfig,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let path = path.borrow();
        let ranks = group.size() as i64;
        let kv_heads = config.kv_heads.unwrap_or(config.heads);
        check_positive("heads", config.heads)?;
        check_positive("kv_heads", kv_heads)?;
        for (argument, whole, part, of) in [
            ("heads", width, config.heads, "divide the width"),
            ("heads", config.heads, ranks, "divide by the ranks of the group"),
            ("kv_heads", config.heads, kv_heads, "divide the heads"),
            ("kv_heads", kv_heads, ranks, "divide by the ranks of the group"),
        ] {
            if whole % part != 0 {
                return Err(Error::invalid(
                    argument,
                    format!("it must {of}, but {whole} / {part} leaves a rest"),
                ));
            }
        }
        let head_width = width / config.heads;
        let parts = [width, kv_heads * head_width, kv_heads * head_width];
        let linear = ParallelLinearConfig {
            bias: config.bias,
            gather_output: false,
            input_is_parallel: true,
            sequence_parallel: config.sequence_parallel,
        };
        Ok(Self {
            qkv: ColumnParallelLinear::fused(path / "qkv", width, &parts, linear, config.qkv_init, group)?,
            out: RowParallelLinear::with_init(path / "out", width, width, linear, config.out_init, group)?,
            heads: config.heads / ranks,
            kv_heads: kv_heads / ranks,
            head_width,
            causal: config.causal,
            dropout: None,
            group: group.clone(),
        })
    }

    /// In training each attention weight is zero with probability `p`, as in GPT-2's `attn_pdrop`
    /// ([`f_forward_t`](Self::f_forward_t)). Each rank drops weights of its own heads, from a random stream of its
    /// own that `seed` begins on all ranks.
    ///
    /// # Errors
    /// `InvalidArgument` where `p` is no probability.
    pub fn with_dropout(mut self, p: f64, seed: u64) -> Result<Self> {
        self.dropout = Some(ParallelDropout::split(p, seed, self.qkv.ws.device(), &self.group)?);
        Ok(self)
    }

    /// The layer's outputs, without dropout.
    ///
    /// # Errors
    /// `ShapeMismatch` for an input that is not `[batch, sequence, width]`; those of the group's collectives.
    pub fn f_forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.f_forward_t(xs, false)
    }

    /// The layer's outputs, in training with the dropout it may have.
    ///
    /// # Errors
    /// As [`f_forward`](Self::f_forward).
    pub fn f_forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let mixed = self.qkv.f_forward(xs)?;
        let Ok((batch, sequence, _)) = mixed.size3() else {
            return Err(Error::ShapeMismatch {
                argument: "xs",
                expected: "three dimensions, batch, sequence and width".to_owned(),
                got: format!("{:?}", xs.size()),
            });
        };
        let widths = [self.heads, self.kv_heads, self.kv_heads].map(|heads| heads * self.head_width);
        let parts = mixed.f_split_with_sizes(widths, -1)?;
        // [batch, sequence, heads * width] to [batch, heads, sequence, width]
        let by_head = |t: &Tensor| -> Result<Tensor> {
            Ok(t.f_view([batch, sequence, -1, self.head_width])?.f_transpose(1, 2)?)
        };
        let [q, k, v] = [by_head(&parts[0])?, by_head(&parts[1])?, by_head(&parts[2])?];
        let mixed = match self.dropout.as_ref().filter(|_| train) {
            Some(dropout) => self.attend_and_drop(&q, &k, &v, dropout)?,
            None => {
                let shared = self.kv_heads != self.heads;
                let mask = None::<&Tensor>;
                Tensor::f_scaled_dot_product_attention(&q, &k, &v, mask, 0.0, self.causal, None, shared)?
            }
        };
        self.out.f_forward(&mixed.f_transpose(1, 2)?.f_reshape([batch, sequence, -1])?)
    }

    /// Attention step by step: libtorch's own would draw from its default generator.
    fn attend_and_drop(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        dropout: &ParallelDropout,
    ) -> Result<Tensor> {
        let all_heads =
            |t: &Tensor| t.f_repeat_interleave_self_int(self.heads / self.kv_heads, 1, None::<i64>);
        let (k, v) = (all_heads(k)?, all_heads(v)?);
        let mut scores =
            q.f_matmul(&k.f_transpose(-2, -1)?)?.f_div_scalar((self.head_width as f64).sqrt())?;
        if self.causal {
            let sequence = scores.size()[2];
            let later = Tensor::f_ones([sequence, sequence], (Kind::Bool, scores.device()))?.f_triu(1)?;
            scores = scores.f_masked_fill(&later, f64::NEG_INFINITY)?;
        }
        let weights = scores.f_softmax(-1, scores.kind())?;
        Ok(dropout.forward(&weights, true)?.f_matmul(&v)?)
    }
}

impl nn::Module for ParallelSelfAttention {
    fn forward(&self, xs: &Tensor) -> Tensor {
        or_raise(self.f_forward(xs))
    }
}
