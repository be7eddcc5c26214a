use torpor_dumper::{Options, Target};
fn main() -> anyhow::Result<()> {
    let a: Vec<String> = std::env::args().collect();
    let t = std::time::Instant::now();
    let target = Target::find(a[1].parse()?)?;
    let t1 = t.elapsed();
    let mut f = target.freeze()?;
    let mut o = Options::default(); o.runs_on = true;
    let d = f.dump(a[2].as_ref(), &o)?;
    let t2 = t.elapsed();
    if a.len() > 3 { f.kill()?; } else { f.resume(); }
    println!("find {t1:?} dump {t2:?} all {:?} {:?}", t.elapsed(), d.manifest.times);
    let img = torpor_image::Image::open(a[2].as_ref())?;
    println!("{} vmas {} threads", img.tasks[0].memory.vmas.len(), img.tasks[0].threads.len());
    img.verify(|_| ())?;
    Ok(())
}
