use torpor_restorer::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let t = std::time::Instant::now();
    let image = torpor_image::Image::open(a[1].as_ref()).unwrap();
    let p = plan(&image, &Host::probe().unwrap(), &Options::default()).unwrap();
    if a.len() > 2 { print!("{p}"); }
    let t1 = t.elapsed();
    match prepare(&image, &p, None) { Ok(x) => { let r = x.resume(false); println!("pid {} plan {t1:?} all {:?}", r.pid(), t.elapsed()); } Err(e) => { println!("ERR {e}"); } }
}
