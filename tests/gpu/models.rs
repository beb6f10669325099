//! Models of the sizes that are timed. `beside.py` has the same.

use tch::nn::{self, Module};
use tch::{Kind, Tensor};

pub(crate) const VOCABULARY: i64 = 50_257;
pub(crate) const CONTEXT: i64 = 512;
const WIDTH: i64 = 768;
const HEADS: i64 = 12;
const LAYERS: i64 = 12;

/// GPT-2 small: 124 million parameters, and no dropout.
#[derive(Debug)]
pub(crate) struct Gpt {
    tokens: nn::Embedding,
    places: Tensor,
    blocks: Vec<Block>,
    norm: nn::LayerNorm,
}

#[derive(Debug)]
struct Block {
    norms: [nn::LayerNorm; 2],
    attention: nn::Linear,
    projection: nn::Linear,
    wide: nn::Linear,
    narrow: nn::Linear,
}

impl Gpt {
    pub(crate) fn new(root: &nn::Path) -> Self {
        Self {
            tokens: nn::embedding(root / "tokens", VOCABULARY, WIDTH, Default::default()),
            places: root.randn("places", &[CONTEXT, WIDTH], 0.0, 0.02),
            blocks: (0..LAYERS).map(|i| Block::new(&(root / "blocks" / i))).collect(),
            norm: nn::layer_norm(root / "norm", vec![WIDTH], Default::default()),
        }
    }
}

impl Module for Gpt {
    /// Scores of the next token, with the weights of the embedding.
    fn forward(&self, tokens: &Tensor) -> Tensor {
        let x = self.tokens.forward(tokens) + &self.places;
        let x = self.blocks.iter().fold(x, |x, block| block.forward(&x));
        self.norm.forward(&x).linear(&self.tokens.ws, None::<Tensor>)
    }
}

impl Block {
    fn new(root: &nn::Path) -> Self {
        let linear = |name: &str, from, to| nn::linear(root / name, from, to, Default::default());
        let norm = |name: &str| nn::layer_norm(root / name, vec![WIDTH], Default::default());
        Self {
            norms: [norm("norm1"), norm("norm2")],
            attention: linear("attention", WIDTH, 3 * WIDTH),
            projection: linear("projection", WIDTH, WIDTH),
            wide: linear("wide", WIDTH, 4 * WIDTH),
            narrow: linear("narrow", 4 * WIDTH, WIDTH),
        }
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> Tensor {
        let (batch, length) = (x.size()[0], x.size()[1]);
        let parts = self.attention.forward(&self.norms[0].forward(x)).chunk(3, -1);
        let heads = |t: &Tensor| t.view([batch, length, HEADS, WIDTH / HEADS]).transpose(1, 2);
        let [q, k, v] = [0, 1, 2].map(|i| heads(&parts[i]));
        let seen =
            Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, true, None::<f64>, false);
        let seen = seen.transpose(1, 2).contiguous().view([batch, length, WIDTH]);
        let x = x + self.projection.forward(&seen);
        let wide = self.wide.forward(&self.norms[1].forward(&x)).gelu("none");
        x + self.narrow.forward(&wide)
    }
}

/// The loss of a model that gives scores, in `Float`.
pub(crate) fn cross_entropy(scores: &Tensor, targets: &Tensor) -> Tensor {
    let classes = scores.size().last().copied().unwrap_or(1);
    scores.reshape([-1, classes]).to_kind(Kind::Float).cross_entropy_for_logits(&targets.reshape([-1]))
}
