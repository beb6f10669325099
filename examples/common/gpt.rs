//! A GPT made of split layers: on a group of one rank it is the ordinary model.

use tch::nn::{self, Init};
use tch::{Kind, Tensor};
use tch_distributed::model_parallel::tensor::{
    Activation, AttentionConfig, LinearInit, ParallelDropout, ParallelLayerNorm, ParallelLinearConfig,
    ParallelMlp, ParallelSelfAttention, VocabParallelEmbedding, split_sequence, vocab_parallel_cross_entropy,
};
use tch_distributed::{ProcessGroup, Result};

/// The model's sizes; the names are GPT-2's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) vocabulary: i64,
    pub(crate) context: i64,
    pub(crate) width: i64,
    pub(crate) layers: usize,
    pub(crate) heads: i64,
    /// Activations outside attention and feed-forward are split along the sequence.
    pub(crate) sequence_parallel: bool,
    pub(crate) seed: i64,
    /// The probability with which attention weights, hidden features and what is added to the residual stream are
    /// dropped in training.
    pub(crate) dropout: f64,
    /// Of the dropout: every copy of the model has one of its own.
    pub(crate) dropout_seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocabulary: 256,
            context: 64,
            width: 64,
            layers: 4,
            heads: 4,
            sequence_parallel: false,
            seed: 1,
            dropout: 0.0,
            dropout_seed: 1,
        }
    }
}

impl Config {
    /// GPT-2 begins with normal weights, those into the residual stream smaller with depth.
    fn init(&self, residual: bool) -> LinearInit {
        let depth = if residual { 2.0 * self.layers as f64 } else { 1.0 };
        LinearInit { ws: Init::Randn { mean: 0.0, stdev: 0.02 / depth.sqrt() }, bs: Some(Init::Const(0.0)) }
    }
}

/// One part of the model: some blocks, with the embedding before them, or the head after them, or both.
#[derive(Debug)]
pub(crate) struct Part {
    embedding: Option<(VocabParallelEmbedding, Tensor)>,
    blocks: Vec<Block>,
    head: Option<(ParallelLayerNorm, VocabParallelEmbedding)>,
    config: Config,
    group: ProcessGroup,
}

#[derive(Debug)]
struct Block {
    norms: [ParallelLayerNorm; 2],
    attention: ParallelSelfAttention,
    mlp: ParallelMlp,
    dropout: ParallelDropout,
}

impl Part {
    /// Part `part` of `parts`, split over `group`. Each layer draws from a seed of its own, so that a model begins the
    /// same however it is cut.
    pub(crate) fn new(
        root: &nn::Path,
        config: Config,
        part: usize,
        parts: usize,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let (first, last) = (part == 0, part + 1 == parts);
        let embedding = || {
            tch::manual_seed(config.seed);
            let (vocabulary, width) = (config.vocabulary, config.width);
            let small = Init::Randn { mean: 0.0, stdev: 0.02 };
            let config =
                ParallelLinearConfig { sequence_parallel: config.sequence_parallel, ..Default::default() };
            VocabParallelEmbedding::with_init(root / "wte", vocabulary, width, small, config, group)
        };
        // The head is tied to the embedding: one tensor where a rank has both, a copy where it has the head only.
        let tokens = (first || last).then(embedding).transpose()?;
        let positions = first.then(|| {
            tch::manual_seed(config.seed + 1);
            (root / "wpe").randn("weight", &[config.context, config.width], 0.0, 0.02)
        });
        let layers = config.layers * part / parts..config.layers * (part + 1) / parts;
        let blocks = layers.map(|layer| Block::new(&(root / "h" / layer), config, layer, group));
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let norm = last.then(|| norm(&(root / "ln_f"), config, group));
        let (for_embedding, for_head) = match (first, last, tokens) {
            (true, true, Some(tokens)) => {
                let copy = tokens.share();
                (Some(tokens), Some(copy))
            }
            (true, _, tokens) => (tokens, None),
            (_, _, tokens) => (None, tokens),
        };
        Ok(Self {
            embedding: for_embedding.zip(positions),
            blocks,
            head: norm.zip(for_head),
            config,
            group: group.clone(),
        })
    }

    /// The weight that embedding and head share, where this part has one of them.
    pub(crate) fn tied(&self) -> Option<Tensor> {
        let tokens = self.embedding.as_ref().map(|e| &e.0).or(self.head.as_ref().map(|h| &h.1));
        tokens.map(|t| t.ws.shallow_clone())
    }

    /// From tokens `[batch, sequence]` or hidden states to hidden states or this rank's share of the logits.
    pub(crate) fn f_forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let mut hidden = match &self.embedding {
            Some((tokens, positions)) => {
                let mut positions = positions.f_narrow(0, 0, xs.size()[1])?.f_unsqueeze(0)?;
                if self.config.sequence_parallel {
                    positions = split_sequence(&positions, &self.group)?;
                }
                tokens.f_forward(xs)? + positions
            }
            None => xs.shallow_clone(),
        };
        for block in &self.blocks {
            let attended = block.attention.f_forward_t(&block.norms[0].f_forward(&hidden)?, train)?;
            hidden = hidden.f_add(&block.dropout.forward(&attended, train)?)?;
            let mixed = block.mlp.f_forward_t(&block.norms[1].f_forward(&hidden)?, train)?;
            hidden = hidden.f_add(&block.dropout.forward(&mixed, train)?)?;
        }
        match &self.head {
            Some((norm, tokens)) => tokens.logits(&norm.f_forward(&hidden)?),
            None => Ok(hidden),
        }
    }
}

impl nn::ModuleT for Part {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Tensor {
        self.f_forward(xs, train).unwrap_or_else(|error| panic!("{error}"))
    }
}

impl Block {
    fn new(path: &nn::Path, config: Config, layer: usize, group: &ProcessGroup) -> Result<Self> {
        tch::manual_seed(config.seed + 100 + layer as i64);
        let (inner, residual) = (config.init(false), config.init(true));
        let sequence_parallel = config.sequence_parallel;
        let attention = AttentionConfig {
            heads: config.heads,
            sequence_parallel,
            qkv_init: inner,
            out_init: residual,
            ..Default::default()
        };
        let linear = ParallelLinearConfig { sequence_parallel, ..Default::default() };
        let (width, inits, activation) = (config.width, [inner, residual], Activation::GeluTanh);
        let (p, seed) = (config.dropout, config.dropout_seed.wrapping_add(1000 * (layer as u64 + 1)));
        let attention = ParallelSelfAttention::new(path / "attn", width, attention, group)?;
        let mlp = ParallelMlp::with_init(path / "mlp", width, 4 * width, activation, linear, inits, group)?;
        // The residual stream is the same on every rank, or split along the sequence.
        let dropout = match sequence_parallel {
            true => ParallelDropout::split(p, seed + 2, path.device(), group)?,
            false => ParallelDropout::replicated(p, seed + 2, path.device())?,
        };
        Ok(Self {
            norms: [norm(&(path / "ln_1"), config, group), norm(&(path / "ln_2"), config, group)],
            attention: if p > 0.0 { attention.with_dropout(p, seed)? } else { attention },
            mlp: if p > 0.0 { mlp.with_dropout(p, seed + 1)? } else { mlp },
            dropout,
        })
    }
}

fn norm(path: &nn::Path, config: Config, group: &ProcessGroup) -> ParallelLayerNorm {
    ParallelLayerNorm::new(path, config.width, Default::default(), config.sequence_parallel, group)
}

/// The mean loss of predicting `targets` from this rank's share of the logits.
pub(crate) fn loss(logits: &Tensor, targets: &Tensor, group: &ProcessGroup) -> Result<Tensor> {
    let losses = vocab_parallel_cross_entropy(logits, targets, group)?;
    Ok(losses.f_mean(losses.kind())?)
}

/// Text as bytes: batches of it, the same on every rank for the same step.
#[derive(Debug)]
pub(crate) struct Text {
    bytes: Tensor,
}

#[allow(dead_code, reason = "each program includes this file and uses what it needs")]
impl Text {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self { bytes: Tensor::from_slice(bytes).to_kind(Kind::Int64) }
    }

    /// The sources of this crate, one after another.
    pub(crate) fn of_this_crate() -> std::io::Result<Self> {
        let mut files = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
        let mut sources = Vec::new();
        while let Some(path) = files.pop() {
            if path.is_dir() {
                files.extend(
                    std::fs::read_dir(path)?.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?,
                );
            } else if path.extension().is_some_and(|e| e == "rs") {
                sources.push(path);
            }
        }
        sources.sort();
        let texts = sources.into_iter().map(std::fs::read).collect::<Result<Vec<_>, _>>()?;
        Ok(Self::new(&texts.concat()))
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.numel()
    }

    /// `rows` pieces of `context` tokens, and the tokens that come next. Where they begin follows from the step.
    pub(crate) fn batch(&self, step: usize, rows: i64, context: i64) -> (Tensor, Tensor) {
        let last = self.len() as i64 - context - 1;
        let piece = |row: i64| {
            // Steps of the golden ratio visit the whole text evenly.
            let turn = (step as i64 * rows + row) as f64 * 0.618_033_988_749_894_9;
            self.bytes.narrow(0, (turn.fract() * last as f64) as i64, context + 1)
        };
        let all = Tensor::stack(&(0..rows).map(piece).collect::<Vec<_>>(), 0);
        (all.narrow(1, 0, context).contiguous(), all.narrow(1, 1, context).contiguous())
    }
}
