//! tmp
use crate::cli::ConfigArgs;
use crate::config::Environment;
pub fn check(file: Option<std::path::PathBuf>, mut config: ConfigArgs) -> anyhow::Result<()> {
    if file.is_some() {
        config.config = file
    }
    config.load(&Environment::of_process())?;
    Ok(())
}
pub fn schema() -> anyhow::Result<()> {
    Ok(())
}
