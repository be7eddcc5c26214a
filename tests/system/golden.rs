//! Images written by earlier versions must stay readable.

use libtest_mimic::Trial;
use torpor_image::Image;
use torpor_tests::{Outcome, ensure, run_torpor, workspace};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    let dir = workspace().join("tests/golden");
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(std::env::consts::ARCH) {
            trials.push(Trial::test(format!("golden: {name}"), move || Ok(golden(&entry.path())?)));
        }
    }
    trials
}

fn golden(dir: &std::path::Path) -> Outcome {
    let image = Image::open(dir).map_err(|e| e.to_string())?;
    image.verify(|_| ()).map_err(|e| e.to_string())?;
    let path = dir.to_str().ok_or("a path")?;
    run_torpor(&["verify", path])?.expect(0)?;
    let text = run_torpor(&["show", path])?.expect(0)?;
    ensure!(text.contains("golden"), "show:\n{text}");
    // It names another kernel, most likely; the plan for the right one is tested in the restorer.
    let said = run_torpor(&["restore", "--plan", path])?;
    let code = said.code();
    ensure!(matches!(code, 0 | 7), "restore --plan: exit code {code}: {}", said.text);
    said.expect(code).map(drop)
}
