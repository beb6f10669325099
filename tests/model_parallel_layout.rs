//! Which parameters are shards, and files of whole models: names, kinds, damage.

use std::collections::BTreeMap;
use std::path::Path;

use tch::{Device, Kind, Tensor, nn};
use tch_distributed::Error;
use tch_distributed::model_parallel::clip_grad_norm;
use tch_distributed::model_parallel::tensor::{ColumnParallelLinear, Layout, ParallelLinearConfig};
use tch_distributed::testing::run_threads;

const F: (Kind, Device) = (Kind::Float, Device::Cpu);

#[test]
fn two_layers_at_one_path_are_each_split_as_they_are() {
    run_threads(2, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let config = ParallelLinearConfig { bias: false, ..Default::default() };
        let (layers, layout) = Layout::record(&group, || {
            [4, 6].map(|outputs| {
                let full = Tensor::arange(outputs, F).reshape([outputs, 1]);
                ColumnParallelLinear::from_full(vs.root(), &full, None, config, &group).unwrap()
            })
        });
        // tch gave the second one another name, which holds the number of parameters there were.
        assert_eq!(layout.shard("weight").unwrap().full_len(), 4);
        assert_eq!(layout.shard("weight__1").unwrap().full_len(), 6);
        let all = vs.variables();
        for (name, outputs) in [("weight", 4), ("weight__1", 6)] {
            let full = layout.full(name, &all[name]).unwrap();
            assert_eq!(full, Tensor::arange(outputs, F).reshape([outputs, 1]));
        }
        // All ten elements have the gradient 1.
        (layers[0].ws.sum(Kind::Float) + layers[1].ws.sum(Kind::Float)).backward();
        let norm = clip_grad_norm(&vs, &layout, 1e9, &group).unwrap();
        assert!((norm - 10_f64.sqrt()).abs() < 1e-6, "{norm}");
    });
}

#[test]
fn saving_names_that_two_stages_share_is_refused_on_every_rank_and_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    run_threads(2, |group| {
        let alone = group.split(Some(group.rank() as i64), 0).unwrap().unwrap();
        let vs = nn::VarStore::new(Device::Cpu);
        let (_, mut layout) = Layout::record(&alone, || nn::linear(vs.root(), 2, 2, Default::default()));
        let error = layout.save(&vs, &file, &group).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "vs", .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains("bias (ranks 0 and 1), weight (ranks 0 and 1)"), "{error}");
        // As a copy it is the first stage's.
        if group.rank() == 1 {
            ["weight", "bias"].iter().for_each(|name| layout.mark_copy(name));
        }
        layout.save(&vs, &file, &group).unwrap();
        assert_eq!(Tensor::read_safetensors(&file).unwrap().len(), 2);
    });
}

#[test]
fn parameters_are_saved_in_their_own_kinds_also_from_stages_without_any() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    run_threads(3, |group| {
        let alone = group.split(Some(group.rank() as i64), 0).unwrap().unwrap();
        let vs = nn::VarStore::new(Device::Cpu);
        let ((), layout) = Layout::record(&alone, || {
            let of = |name: &str, kind: Kind| {
                let _ = vs.root().add(
                    name,
                    Tensor::full([2], 0.1, (Kind::Double, Device::Cpu)).to_kind(kind),
                    false,
                );
            };
            match group.rank() {
                0 => {}
                1 => of("double", Kind::Double),
                _ => [("float", Kind::Float), ("half", Kind::Half), ("int", Kind::Int64)]
                    .into_iter()
                    .for_each(|(name, kind)| of(name, kind)),
            }
        });
        layout.save(&vs, &file, &group).unwrap();
        let written: BTreeMap<_, _> = Tensor::read_safetensors(&file).unwrap().into_iter().collect();
        let kinds: Vec<_> = written.iter().map(|(name, t)| (name.as_str(), t.kind())).collect();
        assert_eq!(
            kinds,
            [("double", Kind::Double), ("float", Kind::Float), ("half", Kind::Half), ("int", Kind::Int64)]
        );
        assert_eq!(written["double"].double_value(&[1]), 0.1);
    });
}

fn write(file: &Path, header: &str, data: &[u8]) {
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn a_damaged_entry_is_refused_and_one_of_an_unknown_kind_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    run_threads(1, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let (w, mut layout) = Layout::record(&group, || vs.root().zeros("w", &[2]));
        let good = r#""w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
        let data = [1.0_f32.to_le_bytes(), 2.0_f32.to_le_bytes()].concat();

        let other = r#""f8":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[8,11]}"#;
        write(&file, &format!("{{{good},{other}}}"), &[&data[..], &[0; 3]].concat());
        layout.load(&vs, &file).unwrap();
        assert_eq!(Vec::<f32>::try_from(&w).unwrap(), [1.0, 2.0]);

        for (what, entry) in [
            (
                "start after end, and a shape that overflows",
                (r#""F32""#, format!("[{0},{0}]", i64::MAX), "[8,0]"),
            ),
            ("start after end, and a negative shape", (r#""F32""#, "[-2]".to_owned(), "[8,0]")),
            ("a negative shape beside a zero", (r#""F32""#, "[0,-2]".to_owned(), "[0,0]")),
            ("an overflow beside a zero", (r#""F32""#, format!("[0,{0},{0}]", i64::MAX), "[0,0]")),
            ("an unknown kind with start after end", (r#""F8""#, "[2]".to_owned(), "[8,0]")),
            ("beyond the file's end", (r#""F8""#, "[2]".to_owned(), "[0,9]")),
        ] {
            let (dtype, shape, place) = entry;
            let bad = format!(r#""bad":{{"dtype":{dtype},"shape":{shape},"data_offsets":{place}}}"#);
            write(&file, &format!("{{{good},{bad}}}"), &data);
            let error = layout.load(&vs, &file).unwrap_err();
            assert!(matches!(error, Error::Object { .. }), "{what}: {error}");
            assert!(error.to_string().contains("damaged entry bad"), "{what}: {error}");
        }

        write(&file, r#"{"w":{"dtype":"F8","shape":[2],"data_offsets":[0,8]}}"#, &data);
        let error = layout.load(&vs, &file).unwrap_err().to_string();
        assert!(error.contains("w has the unknown kind F8"), "{error}");

        write(&file, &format!("{{{good}}}"), &data);
        let _ = vs.root().zeros("head", &[2]);
        layout.mark_copy("head");
        let error = layout.load(&vs, &file).unwrap_err().to_string();
        assert!(error.contains("no tensor head: a copy is read by its own name"), "{error}");
    });
}
