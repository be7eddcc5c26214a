use torpor_dumper::{Destination, Options, Target};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let t = std::time::Instant::now();
    let r = (|| { let target = Target::find(a[1].parse().unwrap())?; let t1 = t.elapsed(); let to = Destination::create(a[2].as_ref(), false)?; let mut f = target.freeze()?;
    let o = Options::default();
    let d = f.dump(to, &o)?;
    let t2 = t.elapsed();
    if a.len() > 3 { f.kill()?; } else { f.resume(); }
    println!("find {t1:?} dump {t2:?} all {:?} {:?}", t.elapsed(), d.manifest.times); Ok::<_, torpor_dumper::Error>(())})();
    if let Err(e) = r { println!("ERR {e}"); std::process::exit(1); }
}
